"""Domains of labels: the rule, fixed before looking."""

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
