"""``adamerge finetune``: an expert from a pretrained CLIP and labelled images."""

from pathlib import Path

import hydra.utils
from omegaconf import DictConfig
from rich.console import Console

from adamerge.cli import config as configuration
from adamerge.cli.lightning import quiet
from adamerge.errors import DataError
from adamerge.export.writers import save_tensors
from adamerge.files import atomic_file
from adamerge.learning.finetune import finetune
from adamerge.models.heads import zero_shot_heads
from adamerge.models.open_clip import load_clip
from adamerge.models.protocol import ModelSpec
from adamerge.tasks.datasets import load_image_set


def make_expert(config: DictConfig, console: Console) -> Path:
    """Fine-tune and write the image tower, in the pretrained model's dtypes.

    Raises:
        DataError: If the data has no labels or no class names.
        AdamergeError: For everything else that is wrong with model or data.
    """
    quiet()
    output = Path(config.output)
    cache_dir = configuration.cache_dir(config)
    arch, pretrained = (_absolute(name) for name in (config.model.arch, config.model.pretrained))
    clip = load_clip(ModelSpec(config.model.family, arch, pretrained), root=Path.cwd())
    classes = list(config.data.classes) if config.data.classes is not None else None
    images = load_image_set(config.data.root, config.data.split, clip, cache_dir, class_names=classes)
    names = classes or images.class_names
    if images.labels is None or names is None:
        raise DataError(f"fine-tuning needs labels and class names; {config.data.root} lacks them.")
    head = zero_shot_heads(clip, {"task": (names, list(config.templates))}, cache_dir)["task"]
    console.print(f"fine-tuning {clip.arch} on {len(images.images):,} images of {len(names)} classes", highlight=False)
    weights = finetune(
        clip.image_encoder,
        images.images,
        images.labels,
        head,
        make_trainer=hydra.utils.instantiate(config.trainer),
        batch_size=config.batch_size,
        lr=config.lr,
        weight_decay=config.weight_decay,
        warmup_steps=config.warmup_steps,
        crop_scale=config.crop_scale,
        seed=config.seed,
    )
    with atomic_file(output) as temporary:
        save_tensors(temporary, {key: tensor.to(clip.state_dict[key].dtype) for key, tensor in weights.items()})
    console.print(f"written to {output}", highlight=False)
    return output


def _absolute(name: str) -> str:
    """A file's absolute path; a registered name, tag or hub id as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else name
