"""The demonstration's plan and its processes. That it shows a law in five minutes is for `tools/demo.sh` to show."""

import pytest

from ecg_jax import config, demo
from ecg_jax.errors import DataError, EcgJaxError, UsageError
from ecg_jax.models import ladder


def test_grid_is_three_sizes_by_three_subsets_and_one_repeated_cell_per_family():
    assert sorted(rung for share in demo.SHARES.values() for rung in share) == sorted(demo.RUNGS)
    for family in "RT":
        cells = [cell for rung in demo.RUNGS if rung[0] == family for cell in demo.grid(rung, 0)]
        assert len({(c.rung, c.paradigm, c.records) for c in cells}) == 18
        assert len(cells) == 21 and len({c.name for c in cells}) == 21


def test_rungs_span_two_to_sixty_thousand_parameters():
    for family in ("resnet1d", "transformer"):
        counts = [ladder.count(ladder.get(r)) for r in demo.RUNGS if ladder.get(r).family == family]
        assert counts == sorted(counts) and counts[0] < 3_000 and 40_000 < counts[2] < 65_000


def test_settings_are_a_valid_configuration(tmp_path):
    cell = demo.Cell("Td2", "SSL", 2048, 1)
    resolved = config.override(config.Config(), demo.settings(cell, tmp_path, tmp_path / "book"))
    assert resolved.objective.name == "masked_codes" and resolved.objective.codebook == str(tmp_path / "book")
    config.override(config.Config(), demo.CODEBOOK)
    assert (resolved.model.crop, resolved.model.rung, resolved.train.seed) == (500, "Td2", 1)
    assert resolved.data.folders == (str(tmp_path),) and resolved.data.labels == tuple(demo.LABELS)


def test_out_must_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file"):
        demo.demo(tmp_path / "file")


def _good(text, say):
    say(text)


def _bad(say):
    raise DataError("this shard is damaged")


def _dies(say):
    import os

    os._exit(9)


def test_processes_say_things_and_end(capsys):
    demo._together({"a": (_good, ("from a",)), "b": (_good, ("from b",))}, demo._Clock())
    err = capsys.readouterr().err
    assert "from a" in err and "from b" in err


@pytest.mark.parametrize(("job", "says"), [(_bad, "this shard is damaged"), (_dies, "ended with code 9")])
def test_a_failure_in_one_process_ends_all(job, says):
    with pytest.raises(EcgJaxError, match=says):
        demo._together({"good": (_good, ("hi",)), "bad": (job, ())}, demo._Clock())
