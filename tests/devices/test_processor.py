"""What a processor says of itself."""

import pytest

from autocompress.devices import processor


@pytest.mark.parametrize(
    ("machine", "flags", "saturates"),
    [
        ("x86_64", {"avx2"}, True),
        ("x86_64", {"avx2", "avx512_vnni"}, False),
        ("AMD64", {"avx_vnni"}, False),
        ("aarch64", {"asimddp"}, False),
    ],
)
def test_int8_saturates_on_x86_without_vnni(monkeypatch, machine, flags, saturates):
    monkeypatch.setattr(processor.platform, "machine", lambda: machine)
    assert processor.int8_saturates(frozenset(flags)) is saturates


def test_a_system_that_says_nothing_has_a_name_and_no_flags(monkeypatch, tmp_path):
    monkeypatch.setattr(processor, "_cpuinfo", lambda key: "")
    monkeypatch.setattr(processor, "GOVERNOR", tmp_path / "missing")
    assert processor.name()
    assert processor.flags() == frozenset()
    assert processor.listed_flags() == []
    assert processor.governor() is None


def test_only_flags_that_matter_are_listed_in_one_order(monkeypatch):
    monkeypatch.setattr(processor, "_cpuinfo", lambda key: "sse avx512_vnni fpu avx2" if key == "flags" else "")
    assert processor.listed_flags() == ["avx2", "avx512_vnni"]


@pytest.mark.parametrize(
    ("no_turbo", "boost", "told"), [("1", None, "off"), ("0", "0", "on"), (None, "0", "off"), (None, "1", "on"), (None, None, "unknown")]
)
def test_whether_the_clock_may_rise(tmp_path, monkeypatch, no_turbo, boost, told):
    for name, content in (("NO_TURBO", no_turbo), ("BOOST", boost)):
        path = tmp_path / name
        monkeypatch.setattr(processor, name, path)
        if content is not None:
            path.write_text(content + "\n")
    assert processor.turbo() == told


def test_how_hot_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr(processor, "THERMAL", tmp_path)
    assert processor.temperature() == "unknown"
    for number, text in enumerate(("41000", "54400", "broken")):
        (tmp_path / f"thermal_zone{number}").mkdir()
        (tmp_path / f"thermal_zone{number}" / "temp").write_text(text + "\n")
    assert processor.temperature() == "54 C"
