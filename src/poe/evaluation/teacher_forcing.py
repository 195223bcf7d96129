"""Teacher-forced exactness: whether a model gives its largest score to every token of the reference answer.

It is the share of answers that greedy decoding would write token by token like the reference, from one forward pass for
each row. Calls that are equal and written differently do not count.
"""

from collections.abc import Sequence

import torch

from poe.calls.conversation import Conversation
from poe.cascade import Cascade
from poe.data.render import Renderer
from poe.data.templates import complete_template
from poe.evaluation.call_metrics import Counts, Metric, summarize
from poe.modeling.families import is_prefix_lm
from poe.modeling.placement import device_of


@torch.inference_mode()
def measure_teacher_forced(
    cascade: Cascade, stage: str | None, conversations: Sequence[Conversation], *, batch_size: int = 8, seed: int = 0
) -> dict[str, Metric]:
    """Return the shares of first answers whose every token is the model's first choice, and of such tokens.

    The first answer of a row is the first assistant message that is trained on. `stage=None`: the base alone.
    """
    complete_template(cascade.tokenizer)  # of a base without a stage; a stage's is complete
    renderer = Renderer(cascade.tokenizer, vocab_size=cascade.config.vocab_size)
    rows = [_render_answer(renderer, conversation) for conversation in conversations]
    model = cascade.model(stage).eval()
    device, pad = device_of(model.get_input_embeddings()), renderer.stop_token_ids[0]
    counts: list[Counts] = [{}] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        width = max(len(rows[i][0]) for i in part)
        ids = torch.tensor([rows[i][0] + [pad] * (width - len(rows[i][0])) for i in part], device=device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for line, i in enumerate(part):
            inputs["attention_mask"][line, len(rows[i][0]) :] = 0
        if is_prefix_lm(cascade.config):
            firsts = torch.tensor([rows[i][1].index(True) for i in part], device=device)
            inputs["token_type_ids"] = (torch.arange(width, device=device) < firsts[:, None]).long()
        choices = model(**inputs, use_cache=False).logits.argmax(-1)
        for line, i in enumerate(part):
            answer = torch.tensor(rows[i][1][1:], device=device)
            right = (choices[line, : len(answer)] == ids[line, 1 : len(answer) + 1])[answer]
            counts[i] = {
                "teacher_forced_exact": (float(right.all()), 1.0),
                "teacher_forced_tokens": (float(right.sum()), float(len(right))),
            }
    return summarize(counts, seed=seed)


def _render_answer(renderer: Renderer, conversation: Conversation) -> tuple[list[int], list[bool]]:
    """Return the token ids of a row up to the end of its first answer, and which of them are the answer."""
    end = len(conversation.question) + 1
    messages = [*({**m, "weight": 0} if m["role"] == "assistant" else m for m in conversation.question)]
    first = Conversation([*messages, conversation.messages[end - 1]], conversation.tools, form=conversation.form)
    (row,) = (row for row in renderer.render(first) if any(row.loss_mask))
    return row.input_ids, row.loss_mask
