"""Images are decoded once, whatever the layout; bad data is named by row and file."""

import gc
import io
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from adamerge.errors import DataError, OutputError
from adamerge.models.protocol import ClipModel
from adamerge.tasks import sources
from adamerge.tasks.datasets import ImageSet, load_image_set

NAMES = ["cat", "dog", "eel"]
ENCODED = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


class Resizer:
    """The part of a ClipModel that data sets use."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.preprocess_hash = f"resize to {size}"
        self.calls = 0

    def resize(self, image: Image.Image) -> Tensor:
        self.calls += 1
        array = np.array(image.convert("RGB").resize((self.size, self.size), Image.Resampling.NEAREST))
        return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def pixels(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels(seed)).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(
    file: Path,
    images: Sequence[bytes | None],
    labels: Sequence[Any] | None = (),
    names: list[str] | None = NAMES,
    columns: tuple[str, str] = ("image", "label"),
) -> None:
    """The layout of Hugging Face datasets; default labels count through the names."""
    image, label = columns
    rows = [None if content is None else {"bytes": content, "path": None} for content in images]
    table = {image: pa.array(rows, ENCODED)}
    features: dict[str, Any] = {image: {"_type": "Image"}}
    if labels is not None:
        table[label] = pa.array(list(labels) or [index % len(NAMES) for index in range(len(images))])
        if names:
            features[label] = {"names": names, "_type": "ClassLabel"}
        else:
            dtype = {int: "int64", float: "float64", str: "string"}[type(labels[0])]
            features[label] = {"dtype": dtype, "_type": "Value"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(table).replace_schema_metadata(metadata), file)


def write_images(folder: Path, seeds: dict[str, int]) -> None:
    for name, seed in seeds.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(seed))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_parquet(tmp_path / "data" / "test.parquet", [png(seed) for seed in range(5)])
    write_parquet(tmp_path / "data" / "train.parquet", [png(seed) for seed in range(10, 12)])
    return tmp_path / "data"


def load(folder: Path | str, split: str = "test", clip: Resizer | None = None, **options: Any) -> ImageSet:
    cache = options.pop("cache", None) or Path(os.environ["ADAMERGE_CACHE"])
    return load_image_set(str(folder), split, cast(ClipModel, clip or Resizer()), cache, **options)


def assert_holds(images: Tensor, seeds: Sequence[int]) -> None:
    expected = np.stack([pixels(seed).transpose(2, 0, 1) for seed in seeds])
    assert images.dtype == torch.uint8
    np.testing.assert_array_equal(images.numpy(), expected)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ADAMERGE_CACHE", str(tmp_path / "cache"))


class TestParquet:
    def test_images_labels_and_names(self, folder: Path) -> None:
        found = load(folder)
        assert_holds(found.images, range(5))
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 2, 0, 1]
        assert found.labels.dtype == torch.int64
        assert found.class_names == tuple(NAMES)
        assert_holds(load(folder, "train").images, [10, 11])

    def test_sharded_splits(self, tmp_path: Path) -> None:
        for shard in range(2):
            file = tmp_path / "d" / "data" / f"test-0000{shard}-of-00002.parquet"
            write_parquet(file, [png(seed) for seed in (2 * shard, 2 * shard + 1)])
        assert_holds(load(tmp_path / "d").images, range(4))

    @pytest.mark.parametrize("columns", [("jpg", "cls"), ("webp", "fine")])
    def test_other_column_names(self, tmp_path: Path, columns: tuple[str, str]) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [png(1), png(2)], columns=columns)
        found = load(tmp_path / "d")
        assert_holds(found.images, [1, 2])
        assert found.labels is not None
        assert found.class_names == tuple(NAMES)

    def test_plain_integers_as_cls(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [png(1), png(2)], [1, 0], names=None, columns=("jpg", "cls"))
        found = load(tmp_path / "d", class_names=["a", "b"])
        assert found.labels is not None
        assert found.labels.tolist() == [1, 0]
        assert found.class_names == ("a", "b")

    def test_without_hugging_face_metadata(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        table = pa.table({"image": [{"bytes": png(3), "path": None}], "label": [0]})
        pq.write_table(table, tmp_path / "d" / "test.parquet")
        found = load(tmp_path / "d", class_names=["only"])
        assert_holds(found.images, [3])

    def test_without_labels(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [png(1)], labels=None)
        found = load(tmp_path / "d", class_names=NAMES)
        assert found.labels is None
        assert found.class_names == tuple(NAMES)
        assert load(tmp_path / "d").class_names is None

    def test_labels_are_not_read_unasked(self, tmp_path: Path) -> None:
        """Labels that would be refused do no harm where none are asked for, and are still read when they are."""
        write_parquet(tmp_path / "d" / "test.parquet", [png(1)], [9])
        found = load(tmp_path / "d", labels=False)
        assert found.labels is None
        assert found.class_names == tuple(NAMES)
        with pytest.raises(DataError, match="label 9"):
            load(tmp_path / "d")

    def test_other_names_by_label(self, folder: Path) -> None:
        assert load(folder, class_names=["kitten", "puppy", "elver"]).class_names == ("kitten", "puppy", "elver")

    def test_a_readme_may_stand_beside(self, folder: Path) -> None:
        (folder / "README.md").write_text("# toys\n")
        assert_holds(load(folder).images, range(5))


class TestImageFolders:
    SEEDS: ClassVar = {"dog/a.png": 1, "cat/b.png": 2, "cat/a.png": 3}

    def test_split_class_file(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d" / "test", self.SEEDS)
        write_images(tmp_path / "d" / "train", {"dog/z.png": 9})
        found = load(tmp_path / "d")
        assert found.class_names == ("cat", "dog")
        assert_holds(found.images, [3, 2, 1])
        assert found.labels is not None
        assert found.labels.tolist() == [0, 0, 1]
        assert_holds(load(tmp_path / "d", "train").images, [9])

    def test_splits_of_any_name(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d" / "motion_blur", self.SEEDS)
        assert_holds(load(tmp_path / "d", "motion_blur").images, [3, 2, 1])

    def test_flat_folder_serves_every_split(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d", self.SEEDS)
        for split in ("test", "train"):
            found = load(tmp_path / "d", split)
            assert found.class_names == ("cat", "dog")
            assert_holds(found.images, [3, 2, 1])

    def test_a_class_may_be_called_train(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d", {"train/a.png": 1, "bus/a.png": 2})
        found = load(tmp_path / "d", "train")
        assert found.class_names == ("bus", "train")
        assert_holds(found.images, [2, 1])

    def test_unlabelled(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d" / "test", {"b.png": 1, "a.png": 2})
        found = load(tmp_path / "d")
        assert_holds(found.images, [2, 1])
        assert found.labels is None
        write_images(tmp_path / "e", {"b.png": 1})
        assert load(tmp_path / "e").labels is None

    def test_hidden_files_and_notes_are_no_images(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d", self.SEEDS)
        (tmp_path / "d" / ".cat").mkdir()
        (tmp_path / "d" / ".cat" / "x.png").write_bytes(b"")
        (tmp_path / "d" / "notes.txt").write_text("x")
        (tmp_path / "d" / "classes.json").write_text("[]")
        assert_holds(load(tmp_path / "d").images, [3, 2, 1])

    def test_upright_as_exif_says(self, tmp_path: Path) -> None:
        exif = Image.Exif()
        exif[0x0112] = 3  # turned by 180°
        (tmp_path / "d").mkdir()
        Image.fromarray(pixels(1)).save(tmp_path / "d" / "a.png", exif=exif)
        found = load(tmp_path / "d").images[0].permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(found, pixels(1)[::-1, ::-1])

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the file open
    def test_metadata_goes_to_hugging_face(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d" / "test", {"a.png": 1, "b.png": 2})
        (tmp_path / "d" / "test" / "metadata.csv").write_text("file_name,label\na.png,1\nb.png,0\n")
        found = load(tmp_path / "d")
        assert_holds(found.images, [1, 2])
        assert found.labels is not None
        assert found.labels.tolist() == [1, 0]
        gc.collect()


class TestCache:
    def test_decoded_once(self, folder: Path) -> None:
        clip = Resizer()
        first = load(folder, clip=clip)
        second = load(folder, clip=clip)
        assert clip.calls == 5
        assert second.key == first.key
        assert torch.equal(second.images, first.images)
        assert second.labels is not None

    def test_labels_can_follow_later(self, folder: Path) -> None:
        clip = Resizer()
        load(folder, clip=clip, labels=False)
        found = load(folder, clip=clip)
        assert found.labels is not None
        assert clip.calls == 5

    def test_a_hit_needs_neither_datasets_nor_the_files_content(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        long_ago = time.time() - 100
        monkeypatch.setattr(sources.time, "time", lambda: long_ago + 200)  # the files count as settled
        load(folder)
        monkeypatch.setitem(sys.modules, "datasets", None)
        monkeypatch.setattr(sources, "sha256_file", None)
        assert_holds(load(folder).images, range(5))

    def test_changed_content_is_decoded_again(self, folder: Path) -> None:
        first = load(folder)
        write_parquet(folder / "test.parquet", [png(seed) for seed in range(20, 25)])
        second = load(folder)
        assert second.key != first.key
        assert_holds(second.images, range(20, 25))
        assert_holds(first.images, range(5))

    def test_changed_content_of_the_same_size_and_time(self, tmp_path: Path) -> None:
        file = tmp_path / "d" / "a.bmp"
        file.parent.mkdir()
        Image.fromarray(pixels(1)).save(file)
        stat = file.stat()
        load(tmp_path / "d")
        Image.fromarray(pixels(2)).save(file)
        os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert_holds(load(tmp_path / "d").images, [2])

    def test_preprocessing_and_split_are_part_of_the_key(self, folder: Path) -> None:
        keys = {load(folder).key, load(folder, clip=Resizer(4)).key, load(folder, "train").key}
        assert len(keys) == 3
        assert load(folder, clip=Resizer(4)).images.shape == (5, 3, 4, 4)

    def test_same_content_elsewhere_shares_the_cache(self, folder: Path, tmp_path: Path) -> None:
        clip = Resizer()
        key = load(folder, clip=clip).key
        folder.rename(tmp_path / "moved")
        assert load(tmp_path / "moved", clip=clip).key == key
        assert clip.calls == 5

    @pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "no info", "bad info", "bad labels"])
    def test_damaged_caches_are_made_again(self, folder: Path, tmp_path: Path, damage: str) -> None:
        key = load(folder).key
        base = tmp_path / "cache" / "images"
        array, info, labels = base / f"{key}.npy", base / f"{key}.json", base / f"{key}.labels.npy"
        if damage == "truncated":
            array.write_bytes(array.read_bytes()[:-1])
        elif damage in ("empty", "gone"):
            array.unlink()
            if damage == "empty":
                array.touch()
        elif damage == "no info":
            info.unlink()
        elif damage == "bad info":
            info.write_text("{")
        else:
            labels.write_bytes(b"x")
        found = load(folder)
        assert_holds(found.images, range(5))
        assert found.labels is not None
        assert found.labels.tolist() == [0, 1, 2, 0, 1]

    def test_memory_mapped_and_private(self, folder: Path) -> None:
        load(folder).images.zero_()
        assert_holds(load(folder).images, range(5))

    def test_numpy_reads_the_file(self, folder: Path, tmp_path: Path) -> None:
        key = load(folder).key
        array = np.load(tmp_path / "cache" / "images" / f"{key}.npy")
        assert array.shape == (5, 3, 8, 8)

    def test_two_at_once(self, folder: Path, tmp_path: Path) -> None:
        meeting = threading.Barrier(2)

        class Waiting(Resizer):
            def resize(self, image: Image.Image) -> Tensor:
                meeting.wait(timeout=10)
                return super().resize(image)

        with ThreadPoolExecutor(2) as pool:
            first, second = pool.map(lambda _: load(folder, clip=Waiting()), range(2))
        assert first.key == second.key
        assert_holds(first.images, range(5))
        assert_holds(second.images, range(5))
        assert not list((tmp_path / "cache" / "images").glob(".*"))

    def test_nothing_is_left_of_a_failure(self, folder: Path, tmp_path: Path) -> None:
        write_parquet(folder / "test.parquet", [png(0), b"no image"])
        with pytest.raises(DataError):
            load(folder)
        assert not list((tmp_path / "cache" / "images").glob("*.npy"))
        assert not list((tmp_path / "cache" / "images").glob(".*"))

    def test_a_cache_that_cannot_be_written(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=r"cannot write .*paths\.cache_dir"):
            load(folder, cache=tmp_path / "file")

    def test_a_full_disk(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def full(self: object, image: Tensor) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("adamerge.tasks.datasets._Writer.append", full)
        with pytest.raises(OutputError, match=r"cannot write .*images: No space left on device\. Free some room"):
            load(folder)


class TestRefused:
    def test_missing_folder(self, tmp_path: Path) -> None:
        with pytest.raises(DataError, match=r"/gone: no such data folder\. Put parquet files"):
            load(tmp_path / "gone")

    @pytest.mark.parametrize("name", [None, "README.md", ".hidden.png"])
    def test_empty_folder(self, tmp_path: Path, name: str | None) -> None:
        (tmp_path / "d").mkdir()
        if name:
            (tmp_path / "d" / name).touch()
        with pytest.raises(DataError, match=r"/d: the data folder holds no images\. Put parquet files"):
            load(tmp_path / "d")

    def test_missing_split_of_parquet(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"no split 'val', there are .*(train, test|test, train)\. Choose one with"):
            load(folder, "val")

    def test_missing_split_of_images(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d" / "test", {"cat/a.png": 1})
        write_images(tmp_path / "d" / "train", {"cat/a.png": 1})
        with pytest.raises(DataError, match=r"no split 'val', there are test, train\. Choose one with `splits:`"):
            load(tmp_path / "d", "val")

    def test_no_rows(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [], labels=None)
        with pytest.raises(DataError, match=r"split 'test' of .*: the split holds no images"):
            load(tmp_path / "d")

    @pytest.mark.parametrize("content", [b"no image", png(0)[:60], b""])
    def test_corrupt_image_in_parquet(self, tmp_path: Path, content: bytes) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [png(0), png(1), content, png(2)])
        with pytest.raises(
            DataError, match=r"split 'test' of .*/d: row 2 \(row 2 of test\.parquet\) is not a readable image"
        ):
            load(tmp_path / "d")

    def test_the_parquet_file_is_named(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "d" / "test-00000-of-00002.parquet", [png(0), png(1)])
        write_parquet(tmp_path / "d" / "test-00001-of-00002.parquet", [png(2), b"no image"])
        with pytest.raises(DataError, match=r"row 3 \(row 1 of test-00001-of-00002\.parquet\)"):
            load(tmp_path / "d")

    def test_missing_image(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [png(0), None])
        with pytest.raises(DataError, match=r"row 1 .*has no image"):
            load(tmp_path / "d")

    def test_corrupt_image_in_a_folder(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d", {"cat/a.png": 0, "cat/b.png": 1})
        (tmp_path / "d" / "cat" / "b.png").write_bytes(b"")
        with pytest.raises(DataError, match=r"row 1 \(.*cat/b\.png\) is not a readable image"):
            load(tmp_path / "d")

    @pytest.mark.parametrize("kept", [0, 10, 0.5])
    def test_truncated_parquet(self, tmp_path: Path, kept: float) -> None:
        file = tmp_path / "d" / "test.parquet"
        write_parquet(file, [png(seed) for seed in range(50)])
        content = file.read_bytes()
        file.write_bytes(content[: kept if kept > 1 else int(kept * len(content))])
        with pytest.raises(DataError, match=r"/d: .*(cannot read it|truncated or corrupt)"):
            load(tmp_path / "d")

    def test_no_image_column(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / "d" / "test.parquet")
        with pytest.raises(DataError, match=r"no column 'image', there are text, label\. Rename"):
            load(tmp_path / "d")

    def test_images_beside_class_folders(self, tmp_path: Path) -> None:
        write_images(tmp_path / "d", {"cat/a.png": 0, "loose.png": 1})
        with pytest.raises(DataError, match=r"images beside class folders \(loose\.png\)\. Move or remove"):
            load(tmp_path / "d")

    @pytest.mark.parametrize(("label", "rows"), [(3, 1), (-1, 1)])
    def test_labels_out_of_range(self, tmp_path: Path, label: int, rows: int) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [png(0), png(1)], [0, label])
        message = rf"row 1 has label {label}, expected 3 class names \(labels 0 to 2\); {rows} such rows\. Correct"
        with pytest.raises(DataError, match=message):
            load(tmp_path / "d")
        with pytest.raises(DataError, match=message):  # from the cache as well
            load(tmp_path / "d")

    def test_labels_beyond_the_names_given(self, tmp_path: Path) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [png(0), png(1)], [0, 2], names=None)
        with pytest.raises(DataError, match=r"row 1 has label 2, expected 2 class names"):
            load(tmp_path / "d", class_names=["a", "b"])

    @pytest.mark.parametrize("label", ["cat", 0.5])
    def test_labels_that_are_no_integers(self, tmp_path: Path, label: object) -> None:
        write_parquet(tmp_path / "d" / "test.parquet", [png(0)], [label], names=None)
        with pytest.raises(DataError, match=rf"the label of row 0 is {label!r}, expected an integer"):
            load(tmp_path / "d", class_names=NAMES)

    def test_another_number_of_class_names(self, folder: Path) -> None:
        with pytest.raises(
            DataError, match=r"2 class names are given, but the data set has 3 classes \(cat, dog, eel\)"
        ):
            load(folder, class_names=["a", "b"])

    def test_the_same_class_names_in_another_order(self, folder: Path) -> None:
        with pytest.raises(DataError, match=r"in another order\. Labels follow the data set's order \(cat, dog, eel\)"):
            load(folder, class_names=["dog", "cat", "eel"])

    def test_images_of_several_shapes(self, tmp_path: Path) -> None:
        class Growing(Resizer):
            def resize(self, image: Image.Image) -> Tensor:
                self.size += 1
                return super().resize(image)

        write_images(tmp_path / "d", {"a.png": 0, "b.png": 1})
        with pytest.raises(DataError, match=r"row 1 \(.*b\.png\) has shape \(3, 10, 10\), not \(3, 9, 9\)"):
            load(tmp_path / "d", clip=Growing())


class TestHub:
    @pytest.fixture
    def hub(self, monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
        import datasets

        features = datasets.Features({"jpg": datasets.Image(), "cls": datasets.ClassLabel(names=NAMES)})
        rows = {"jpg": [{"bytes": png(1), "path": None}, {"bytes": png(2), "path": None}], "cls": [1, 2]}
        stored = datasets.Dataset.from_dict(rows, features=features)
        calls = []

        def load_dataset(name: str, config: str | None, *, split: str, cache_dir: str):
            calls.append((name, config, split, cache_dir))
            if split != "test":
                raise ValueError(f"Unknown split '{split}'. Should be one of ['test'].")
            return stored

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return calls

    @pytest.mark.parametrize(
        ("data", "name", "config"),
        [
            ("owner/name", "owner/name", None),
            ("ufldl-stanford/svhn:cropped_digits", "ufldl-stanford/svhn", "cropped_digits"),
        ],
    )
    def test_names(self, hub: list[tuple], tmp_path: Path, data: str, name: str, config: str | None) -> None:
        clip = Resizer()
        for _ in range(2):
            found = load(data, clip=clip)
            assert_holds(found.images, [1, 2])
            assert found.class_names == tuple(NAMES)
        assert clip.calls == 2
        assert hub[0] == (name, config, "test", str(tmp_path / "cache" / "datasets"))

    def test_unknown_split(self, hub: list[tuple]) -> None:
        with pytest.raises(DataError, match=r"owner/name: no such folder, .*load split 'val'.*one of \['test'\]"):
            load("owner/name", "val")

    @pytest.mark.parametrize("data", ["a/b/c", "./gone", "/gone", "~/gone", "a.tar.gz/b/c"])
    def test_paths_never_reach_the_hub(self, hub: list[tuple], data: str) -> None:
        with pytest.raises(DataError, match=r"no such data folder|holds no images"):
            load(data, "val")
        assert not hub


def test_progress_bars_and_loggers_are_left_as_found(folder: Path) -> None:
    import datasets

    before = datasets.are_progress_bars_disabled()
    load(folder)
    assert datasets.are_progress_bars_disabled() == before


def test_importing_the_module_is_cheap() -> None:
    code = "import sys, adamerge.tasks.datasets as m; sys.exit(any(n in sys.modules for n in ('datasets', 'pyarrow')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.shared
def test_real8(real8: Path, tmp_path: Path) -> None:
    total = 0
    for task in sorted((real8 / "data").iterdir()):
        found = load(task, clip=Resizer(32), cache=tmp_path)
        assert found.labels is not None
        assert found.class_names is not None
        assert int(found.labels.max()) == len(found.class_names) - 1
        total += len(found.images)
    assert total == 6472
