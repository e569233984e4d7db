"""Public measurements: every number that was verified elsewhere, within its tolerance. Skipped without the data."""

import csv
import json

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from ecg_jax.scaling import allocation, bootstrap, forms, laws, profile
from ecg_jax.scaling.solve import fit_law

JOINT = laws.get("hoffmann", ("N", "D"))
SECOND = 3178


@pytest.fixture(scope="module")
def chinchilla(shared_data):
    folder = shared_data / "scaling"
    if not (folder / "epoch_chinchilla_svg.csv").is_file():
        pytest.skip("no public scaling measurements")
    with open(folder / "epoch_chinchilla_svg.csv") as file:
        rows = list(csv.DictReader(file))
    n, c, y = (np.array([float(r[k]) for r in rows]) for k in ("Model Size", "Training FLOP", "loss"))
    return folder, n, c / (6 * n), c, y


def test_published_log_huber_fit(chinchilla):
    _, n, d, _, y = chinchilla
    keep = y < np.sort(y)[-5]
    fit = fit_law(JOINT, laws.design(JOINT, n[keep], d[keep]), y[keep], delta=1e-3)
    p = fit.parameters
    assert fit.n == 240 and fit.objective <= 0.0010182740180
    assert (p["A"], p["B"]) == (pytest.approx(477.8259, rel=1e-4), pytest.approx(2143.4174, rel=1e-4))
    assert [p["E"], p["alpha"], p["beta"]] == pytest.approx([1.8172181, 0.3473105, 0.3671724], abs=1e-6)
    everything = fit_law(JOINT, laws.design(JOINT, n, d), y, delta=1e-3)
    assert everything.objective == pytest.approx(0.00182601052307, rel=1e-10)
    assert everything.parameters["B"] == pytest.approx(12845.61, rel=1e-4)


def test_published_least_absolute_deviations(chinchilla):
    _, n, d, _, y = chinchilla
    keep = y < np.sort(y)[-5]
    p = fit_law(JOINT, laws.design(JOINT, n[keep], d[keep]), y[keep], loss="lad").parameters
    assert [p["A"], p["B"]] == pytest.approx([482.00, 2085.4], rel=2e-4)
    assert [p["E"], p["alpha"], p["beta"]] == pytest.approx([1.81686, 0.347813, 0.365854], abs=1e-5)


@pytest.mark.parametrize(
    "rows, truth, rss",
    [
        (217, [1.905092, 4.000522, 1.050948, 0.351058, 0.458742], 0.06241429288),
        (240, [1.8828136, 4.0598408, 1.0744587, 0.3576151, 0.4276206], 0.08320380769),
    ],
)
def test_published_least_squares(chinchilla, rows, truth, rss):
    _, n, d, c, y = chinchilla
    keep = (y < np.sort(y)[-5]) & ((c < 1e21) | (rows == 240))
    fit = fit_law(JOINT, laws.design(JOINT, n[keep] / 1e6, d[keep] / 1e9), y[keep], loss="ls")
    assert fit.n == rows
    assert fit.raw == pytest.approx(truth, rel=1e-6)
    assert fit.objective == pytest.approx(rss, rel=1e-9)


@pytest.fixture(scope="module")
def published_draws(chinchilla):
    folder, n, d, _, y = chinchilla
    keep = y < np.sort(y)[-5]
    x = laws.design(JOINT, n[keep], d[keep])
    fit = fit_law(JOINT, x, y[keep], delta=1e-3)
    counts = np.load(folder / "epoch_bootstrap_counts.npz")["counts"]
    return bootstrap.draw(fit, x, y[keep], bootstrap.cell_keys(n[keep], d[keep]), counts=counts)


def test_published_bootstrap(published_draws):
    raw = published_draws.raw
    se = raw.std(axis=0, ddof=1)
    assert se[[0, 1, 3, 4]] == pytest.approx([0.025677, 124.475, 0.015396, 0.020629], rel=0.002)
    assert se[2] == pytest.approx(1312.118, rel=0.016)
    low, high = np.quantile(raw, [0.025, 0.975], axis=0)
    assert low == pytest.approx([1.76935, 286.085, 1042.366, 0.316823, 0.331261], rel=1e-3)
    assert high == pytest.approx([1.871228, 743.610, 5810.359, 0.373283, 0.415375], rel=1e-3)
    assert published_draws.unconverged <= 4  # of 4,000: halted on a kink of the criterion


def test_synthetic_truth_to_nine_digits(shared_data):
    path = shared_data / "scaling" / "synthetic_noiseless.csv"
    if not path.is_file():
        pytest.skip("no synthetic measurements")
    truth = json.loads((path.parent / "synthetic_truth.json").read_text())["families"]
    with open(path) as file:
        rows = list(csv.DictReader(file))
    for family, expected in truth.items():
        mine = [r for r in rows if r["family"] == family]
        n, d, y = (np.array([float(r[k]) for r in mine]) for k in ("n_params", "n_records", "loss_id"))
        p = fit_law(JOINT, laws.design(JOINT, n, d), y).parameters
        found = [p["E"], p["A"] * 1e6 ** -p["alpha"], p["alpha"], p["B"] * 1e5 ** -p["beta"], p["beta"]]
        assert found == pytest.approx(expected, rel=1e-9)


def test_published_fits_with_every_row(chinchilla):
    _, n, d, _, y = chinchilla
    p = fit_law(JOINT, laws.design(JOINT, n, d), y, loss="lad").parameters
    found = [np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]]
    assert found == pytest.approx([6.13873, 9.43594, 0.63414, 0.34538, 0.45190], abs=1e-3)
    p = fit_law(JOINT, laws.design(JOINT, n, d), y, delta=1e-3).parameters
    assert [p["A"], p["B"]] == pytest.approx([495.7260, 12845.61], rel=1e-4)
    assert [p["E"], p["alpha"], p["beta"]] == pytest.approx([1.891338, 0.3493129, 0.4530493], abs=1e-6)


def test_published_bootstrap_summaries(chinchilla, published_draws):
    a = published_draws.raw[:, 4] / (published_draws.raw[:, 3] + published_draws.raw[:, 4])
    assert a.std(ddof=1) == pytest.approx(0.019982, rel=0.002)
    assert np.quantile(a, [0.025, 0.975]) == pytest.approx([0.480468, 0.556235], rel=1e-3)
    assert np.diff(np.quantile(a, [0.1, 0.9]))[0] == pytest.approx(0.051419, abs=1e-4)
    # One draw has a second, better optimum, which the published procedure misses (note b) and we do not.
    assert published_draws.improved >= 1 and published_draws.raw[SECOND, 2] == pytest.approx(17777.2, rel=1e-3)
    logs = np.delete(published_draws.raw, SECOND, axis=0)  # E, A, B, alpha, beta -> ln A, ln B, ln E, alpha, beta
    logs[:, :3] = np.log(logs[:, [1, 2, 0]])
    _, n, d, _, y = chinchilla
    keep = y < np.sort(y)[-5]
    p = fit_law(JOINT, laws.design(JOINT, n[keep], d[keep]), y[keep], delta=1e-3).parameters
    ours = np.array([np.log(p["A"]), np.log(p["B"]), np.log(p["E"]), p["alpha"], p["beta"]])
    gap = np.array([*np.log([406.4, 410.7, 1.69337]), 0.3392, 0.2849]) - ours  # of Hoffmann et al.
    assert gap @ np.linalg.solve(np.cov(logs.T), gap) == pytest.approx(238.52, abs=0.5)


def test_likelihood_ratio_of_the_published_law_under_a_huber_density_with_free_scale(chinchilla):
    """The density's scale collapses until its Gaussian core is 5e-9 wide; the 245-row figure judges the 240-row fit."""
    _, n, d, _, y = chinchilla
    kept = y < np.sort(y)[-5]
    made = fit_law(JOINT, laws.design(JOINT, n[kept], d[kept]), y[kept], loss="lad")
    theirs = np.exp(0.5267228) + np.exp(6.0073404) * n**-0.33917084 + np.exp(6.0179186) * d**-0.2849083

    def deviance(residual, delta=1e-3):
        size = np.abs(residual)

        def total(log_scale):
            u = size / np.exp(log_scale)
            return np.where(u <= delta, 0.5 * u * u, delta * (u - 0.5 * delta)).sum() + len(u) * log_scale

        return 2 * minimize_scalar(total, bounds=(-16.0, -8.0), method="bounded", options={"xatol": 1e-9}).fun

    ours = made.predict(laws.design(JOINT, n, d))
    for rows, published in ((kept, 83.995), (np.ones(len(y), bool), 86.750)):
        ratio = deviance(np.log(theirs / y)[rows]) - deviance(np.log(ours / y)[rows])
        assert ratio == pytest.approx(published, abs=0.01)


# ------------------------------------------------------------------------------- the other data sets


def table_of(shared_data, name):
    path = shared_data / "scaling" / name
    if not path.is_file():
        pytest.skip("no public scaling measurements")
    with open(path) as file:
        return list(csv.DictReader(file))


def numbers(rows, *names):
    return (np.array([float(r[name]) for r in rows]) for name in names)


@pytest.mark.parametrize(
    "dataset, held_out",
    [
        ("rpj", {("open_lm_1b", 32.0): 0.71034, ("open_lm_7b", 1.0): 0.73205}),
        ("c4_original", {("open_lm_7b", 1.0): 4.29525}),
        ("rw_original", {("open_lm_7b", 1.0): 1.61926}),
    ],
)
def test_over_trained_models_are_predicted_as_published(shared_data, dataset, held_out):
    rows = table_of(shared_data, "overtraining_104.csv")

    def runs(*wanted):
        mine = [r for r in rows if r["dataset"] == dataset and (r["model"], float(r["cc_mult"])) in wanted]
        n, ratio, loss = numbers(mine, "N", "cc_mult", "loss_c4_val")
        return np.log(np.stack([n, 20 * ratio * n], axis=1)), loss

    small = ["d=96_l=8_h=4", "d=512_l=8_h=4", "d=576_l=24_h=8", "d=1024_l=24_h=8"]
    fit = fit_law(JOINT, *runs(*((m, 1.0) for m in small), (small[0], 16.0)), loss="ls", fixed={"beta": "alpha"})
    p = fit.parameters
    assert fit.n == 5 and p["alpha"] == p["beta"]
    if dataset == "rpj":  # L = a N^b + c 6^(b/2) D^b + E with b = -alpha
        assert fit.objective == pytest.approx(4.2564767e-4, rel=1e-7)
        found = [p["alpha"], p["A"], p["B"] * 6 ** (p["alpha"] / 2), p["E"]]
        assert found == pytest.approx([0.27285070, 166.21098, 366.68717, 1.83664838], rel=1e-7)
    for which, percent in held_out.items():
        x, loss = runs(which)
        assert 100 * abs(fit.predict(x) / loss - 1)[0] == pytest.approx(percent, abs=1e-4)


def test_repeated_data_has_a_better_optimum_than_the_published_one(shared_data):
    rows = table_of(shared_data, "datablations_182.csv")
    *x, loss = numbers(rows, "params", "tokens", "unique_tokens", "loss")
    law, x = forms.get("data-constrained", ("N", "D", "U")), np.log(np.stack(x, axis=1))
    fixed = {
        "E": np.exp(0.6254804),
        "A": np.exp(6.255414),
        "B": np.exp(7.3049974),
        "alpha": 0.3526596,
        "beta": 0.3526596,
    }

    def objective(rd, rn):
        theta = [np.log(fixed["E"]), 6.255414, 7.3049974, 0.3526596, 0.3526596, np.log(rd), np.log(rn)]
        r = np.abs(np.log(law.predict(np.array([theta]), x)[0] / loss))
        return np.where(r <= 1e-3, 0.5 * r * r, 1e-3 * (r - 5e-4)).sum()

    assert objective(15.387756, 5.309743) == pytest.approx(0.01582593526, rel=1e-9)
    fit = fit_law(law, x, loss, delta=1e-3, fixed=fixed)
    assert fit.objective <= 0.0158046626
    assert [fit.parameters["RD"], fit.parameters["RN"]] == pytest.approx([95.365, 1.70590], rel=1e-4)
    held = [fit_law(law, x, loss, delta=1e-3, fixed=fixed | {"RD": rd}).objective for rd in (8.0, 500.0)]
    assert max(held) < 1.01 * fit.objective
    found = profile.profile(fit, x, loss, "RD")
    assert found.high is None and found.low > 2 and found.words == "RD is bounded below only"


def test_llama_surface_and_isoflop_parabolas(shared_data):
    rows = [r for r in table_of(shared_data, "isoflops_public.csv") if r["experiment"] == "llama_3__raw_loss"]
    n, d, c, loss = numbers(rows, "params", "tokens", "budget", "loss")
    p = fit_law(JOINT, laws.design(JOINT, n, d), loss, loss="ls").parameters
    assert [p["E"], p["alpha"], p["beta"]] == pytest.approx([0.6047, 0.3100, 0.3136], abs=5e-5)
    assert [p["A"], p["B"]] == pytest.approx([59.1, 155.1], abs=0.05)
    assert allocation.optimum(p, np.array([1e21])).a == pytest.approx(0.5029, abs=5e-5)
    assert allocation.isoflop(c, n, loss).exponent == pytest.approx(0.4632, abs=5e-5)
    assert allocation.isoflop(c, d, loss).exponent == pytest.approx(0.5368, abs=5e-5)
    good = np.array([r["outlier"] != "True" for r in rows])
    assert allocation.isoflop(c[good], n[good], loss[good]).exponent == pytest.approx(0.5000, abs=5e-5)


def test_noisy_synthetic_families_by_least_squares(shared_data):
    rows = table_of(shared_data, "synthetic_noisy.csv")
    published = {
        "resnet-sl": (0.029868, 0.008114, 0.21806, 0.012067, 0.34855, 8.3671e-4),
        "resnet-ssl": (0.260248, 0.090171, 0.29950, 0.059603, 0.40484, 7.0820e-4),
        "transformer-sl": (0.030098, 0.009253, 0.21979, 0.011836, 0.35523, 5.6877e-4),
        "transformer-ssl": (0.259626, 0.084694, 0.36129, 0.072315, 0.37628, 7.4733e-4),
    }
    for family, (e, a, alpha, b, beta, rss) in published.items():
        n, d, loss = numbers([r for r in rows if r["family"] == family], "n_params", "n_records", "loss_id")
        fit = fit_law(JOINT, laws.design(JOINT, n, d), loss, loss="ls-log")
        p = fit.parameters
        found = [p["E"], p["A"] * 1e6 ** -p["alpha"], p["B"] * 1e5 ** -p["beta"]]
        assert found == pytest.approx([e, a, b], abs=1e-6) and fit.objective == pytest.approx(rss, abs=1e-8)
        assert [p["alpha"], p["beta"]] == pytest.approx([alpha, beta], abs=1e-5)


@pytest.mark.parametrize("task", ["shifted", "unseen"])
def test_transfer_laws_of_the_synthetic_truth(shared_data, task):
    rows = table_of(shared_data, "synthetic_noiseless.csv")
    truth = json.loads((shared_data / "scaling" / "synthetic_truth.json").read_text())
    law = forms.get("transfer", ("N", "D", "T"))
    for family in truth["families"]:
        mine = [r for r in rows if r["family"] == family]
        n, d, home, away = numbers(mine, "n_params", "n_records", "loss_id", f"loss_ood_{task}")
        both = np.log(np.stack([n, d], axis=1))
        x = np.concatenate([np.column_stack([both, np.full(len(n), t)]) for t in (0.0, 1.0)])
        p = fit_law(law, x, np.concatenate([home, away]), n_starts=2).parameters
        expected = truth["ood"][task][family.split("-")[1]]
        assert [p["Eo"], p["K"], p["kappa"]] == pytest.approx(expected, rel=1e-8)
