"""Domains of labels: the rule, fixed before looking."""

import numpy as np
import pytest

from ecg_jax.errors import DataError, UsageError
from ecg_jax.evaluation import tasks

MET = [{"dataset": "code15", "contains": ["samitrop"]}]


def test_seen_and_unseen_are_told_by_name_without_case_and_blanks():
    got = tasks.domains(["AF", "lbbb ", "Old  MI"], ["af", "LBBB"], [{"dataset": "ptbxl"}], MET)
    assert got == ["ood_seen", "ood_seen", "ood_unseen"]
    masks = tasks.by_domain(got)
    assert list(masks) == ["ood_seen", "ood_unseen"] and masks["ood_seen"].tolist() == [True, True, False]


def test_an_encoder_without_labels_has_seen_none():
    assert tasks.domains(["AF"], [], [{"dataset": "ptbxl"}], MET) == ["ood_unseen"]


def test_a_set_in_the_lineage_or_inside_one_another_contaminates_every_label():
    for probed in ("code15", "CODE15", "samitrop"):
        assert tasks.domains(["AF", "x"], ["AF"], [{"dataset": probed}], MET) == ["contaminated"] * 2
    challenge = [{"dataset": "ptbxl"}, {"dataset": "challenge", "contains": ["code15"]}]
    assert tasks.domains(["AF"], [], challenge, MET) == ["contaminated"]


def test_names_that_mislead_are_told_by_their_cards():
    code, ptb, csn = ([{"dataset": name}] for name in ("code15", "ptbxl", "csn"))
    six = ["1dAVb", "RBBB", "LBBB", "SB", "AF", "ST"]
    got = tasks.domains(["CD", "HYP", "MI", "NORM", "STTC"], six, ptb, code, "superclass", "code6")
    assert got == ["ood_seen", *["ood_unseen"] * 4]  # STTC is no sinus tachycardia; no CODE label is "normal"
    got = tasks.domains(["AFIB", "ST", "STE", "SR", "SA"], six, csn, code, "snomed", "code6")
    assert got == ["ood_seen", "ood_seen", "ood_unseen", "ood_unseen", "ood_unseen"]
    assert tasks.domains(["AFLT"], ["AF"], ptb, csn, "rhythm", "snomed") == ["ood_seen"]  # CSN's AF is flutter
    assert tasks.domains(["normal"], six, code, ptb, "normal", "code6") == ["ood_unseen"]


def test_the_simulated_populations_share_the_meanings_of_their_names():
    lineage, probed = [{"dataset": "synthetic"}], [{"dataset": "synthetic_ood"}]
    found = tasks.domains(["RBBB", "AF", "ST", "STD"], ["RBBB", "ST"], probed, lineage, "ood", "code")
    assert found == ["ood_seen", "ood_unseen", "ood_seen", "ood_unseen"]


def test_every_card_is_whole_and_every_preset_names_tasks_that_have_one():
    cards = tasks.cards()
    assert {"ptbxl", "cpsc2018", "csn", "georgia", "code-test", "echonext", "mimic-icu", "ludb", "sph"} <= set(cards)
    for name, card in cards.items():
        assert card["licence"] and card["split"] and card["traps"] and card["tasks"], name
        for task in card["tasks"].values():
            labels = task.get("labels")
            assert labels is None or (len(set(labels)) == len(labels) and set(task.get("means", {})) <= set(labels))
    for preset in ("ptbxl", "study", "left-out"):
        for column in tasks.preset(preset):
            for entry in column["tasks"]:
                dataset, _, task = entry.partition(":")
                assert task in cards[dataset]["tasks"], entry
    assert [len(tasks.preset(name)) for name in ("ptbxl", "study")] == [5, 6]
    with pytest.raises(UsageError, match="did you mean 'study'"):
        tasks.preset("studi")


def test_labels_in_another_order_than_the_card_are_refused():
    order = ["CD", "HYP", "MI", "NORM", "STTC"]
    tasks.check("ptbxl", "superclass", order)
    tasks.check("own", "superclass", ["anything"])
    for wrong, says in ((order[::-1], "another order"), ([*order[:4], "XX"], "'XX'"), (order[:4], "'STTC'")):
        with pytest.raises(DataError, match=says):
            tasks.check("ptbxl@7.3s", "superclass", wrong)


def test_a_split_is_named_by_its_records_and_checked_where_the_card_names_it(monkeypatch):
    train, val, test = np.arange(5, dtype=np.uint64), np.array([7, 9], np.uint64), np.array([8], np.uint64)
    found = tasks.split_hash([train, val, test])
    assert found == tasks.split_hash([train[::-1], val, test])
    assert len({found, tasks.split_hash([train, test, val]), tasks.split_hash([train[:4], val, test])}) == 3
    assert "strat_fold" in tasks.check_split("ptbxl", "1.0.3", found) and "no task card" in tasks.check_split(
        "x", "1", found
    )
    monkeypatch.setattr(tasks, "cards", lambda: {"ptbxl": {"split": "folds", "split_hashes": {"1.0.3": found}}})
    assert tasks.check_split("ptbxl@7.3s", "1.0.3", found) == f"split {found} (folds)"
    assert "no hash to compare" in tasks.check_split("ptbxl", "1.0.1", "0")
    with pytest.raises(DataError, match="its task card says"):
        tasks.check_split("ptbxl", "1.0.3", "0")
