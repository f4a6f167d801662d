"""What a stranger needs to know about a merged model, and how to load it."""

from collections.abc import Mapping
from pathlib import Path


def loading_snippet(directory: Path | str) -> str:
    """The three lines of Python with which open_clip loads the folder ``directory``."""
    source = "local-dir:" + str(directory).replace("\\", "\\\\").replace('"', '\\"')
    return (
        "import open_clip\n"
        f'model, _, preprocess = open_clip.create_model_and_transforms("{source}")\n'
        f'tokenizer = open_clip.get_tokenizer("{source}")\n'
    )


def model_card(
    *, suite: str, base: str, experts: Mapping[str, str], method: str, settings: Mapping[str, object], table: str
) -> str:
    """README.md of the merged folder, with the header that the Hugging Face hub reads.

    Args:
        base: The pretrained model, as the user would name it (architecture and weights).
        experts: Where each expert came from, by task, in the order of merging.
        settings: What decides the outcome (seed, steps, granularity, which images were adapted on, …).
        table: ``Results.markdown()``.
    """
    rows = "".join(f"| {_cell(task)} | {_cell(expert)} |\n" for task, expert in experts.items())
    options = "".join(f"- {name}: `{value}`\n" for name, value in settings.items())
    tasks, fine_tuned = _count(len(experts), "task"), _count(len(experts), "fine-tuned expert")
    return f"""---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- model-merging
- adamerge
---

# {suite} merged with {method}

One CLIP for {tasks}: its image tower merges {fine_tuned}. Its text tower, preprocessing and tokenizer are those of the
pretrained model.

## Load it

```python
{loading_snippet("path/to/this/folder")}```

The class vectors of the tasks are in `heads.safetensors`, which was written one level above this folder:
`logits = torch.nn.functional.normalize(model.encode_image(images), dim=-1) @ head.T` (CLIP's logit scale is inside).

## What was merged

Pretrained model: `{base}`

| task | expert |
| --- | --- |
{rows}
## How

- method: `{method}`
{options}
## Accuracy

Top-1 in %; normalised is merged over expert.

{table}
## Licence

These weights derive from the pretrained model and from the experts, and the terms of all of them apply, as may those of
the data they were trained on. adamerge's own licence covers its code, not these weights.
"""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
