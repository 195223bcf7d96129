"""Measuring specialists."""
