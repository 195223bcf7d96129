"""Write files and folders so that a crash, a full disk, or a second process never leaves half a result."""
