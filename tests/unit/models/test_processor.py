"""Who made the CPU, from what systems say about it."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from adamerge.models import processor


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    processor.made_by_intel.cache_clear()
    yield
    processor.made_by_intel.cache_clear()


@pytest.mark.parametrize(("vendor", "expected"), [("GenuineIntel", True), ("AuthenticAMD", False)])
@pytest.mark.parametrize("linux", [True, False])
def test_the_maker_of_a_cpu(vendor: str, expected: bool, linux: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(path: Path) -> str:
        assert path == Path("/proc/cpuinfo")
        if not linux:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {vendor}\n"

    monkeypatch.setattr(processor.Path, "read_text", read)
    monkeypatch.setattr(processor.platform, "processor", lambda: f"Intel64 Family 6 Model 85 Stepping 7, {vendor}")
    assert processor.made_by_intel() is expected
