"""The simulated waveforms: determinism, lead algebra, principal components, noise, rhythm, intervals."""

import dataclasses

import numpy as np
import pytest
from scipy import signal as dsp

from ecg_jax.records import synthetic
from ecg_jax.records.leads import LEADS
from ecg_jax.records.synthetic import anatomy, hashing, noise, patients, population, render, rhythm
from ecg_jax.records.synthetic.population import FIBRILLATION, LEFT, RIGHT, SINUS

INDEPENDENT = [0, 1, 6, 7, 8, 9, 10, 11]
COUNT = 600


@pytest.fixture(scope="module")
def settings():
    return synthetic.Settings(seed=1)


@pytest.fixture(scope="module")
def batch(settings):
    return synthetic.generate(settings, np.arange(COUNT), patients.assign(settings, COUNT))


@pytest.fixture(scope="module")
def clean(settings):
    quiet = dataclasses.replace(settings, noise=0.0)
    return synthetic.generate(quiet, np.arange(COUNT), patients.assign(settings, COUNT))


def _balanced(count, **options):
    settings = synthetic.Settings(prevalence="balanced", seed=7, **options)
    return settings, *synthetic.states(settings, np.arange(count), np.arange(count))


def test_hash_draws_are_uniform_normal_and_independent_of_company():
    stream = hashing.key("test", 3)
    index = np.arange(20000)
    u = hashing.uniforms(stream, index, 4)
    z = hashing.normals(stream, index, 4)
    assert 0 < u.min() and u.max() < 1
    np.testing.assert_allclose(u.mean(axis=0), 0.5, atol=0.01)
    np.testing.assert_allclose(z.std(axis=0), 1, atol=0.02)
    assert np.abs(np.corrcoef(np.c_[z, np.roll(z, 1, axis=0)].T) - np.eye(8)).max() < 0.03
    np.testing.assert_array_equal(hashing.normals(stream, index[::-7], 4), z[::-7])
    assert not np.array_equal(hashing.uniforms(hashing.key("test", 4), index, 4), u)
    assert hashing.key("a", 1) != hashing.key("b", 1) != hashing.key("b", 2)


@pytest.mark.parametrize("which", [1, 2])
def test_any_subset_in_any_order_is_the_same_to_the_bit(which):
    settings = synthetic.Settings(population=which, prevalence="balanced", seed=5)
    owner = patients.assign(settings, 120)
    whole = synthetic.generate(settings, np.arange(120), owner)
    for index in (np.array([17]), np.array([118, 3, 64, 5]), np.arange(119, 0, -2)):
        part = synthetic.generate(settings, index, owner[index])
        for row, number in enumerate(index):
            assert np.array_equal(part.signal[row], whole.signal[number])
            assert np.array_equal(part.probability[row], whole.probability[number])
            assert np.array_equal(part.labels[row], whole.labels[number])
    again = np.concatenate([b.probability for b in synthetic.batches(settings, np.arange(120), owner)])
    np.testing.assert_array_equal(again, whole.probability)


def test_seed_and_population_change_every_record(batch, settings):
    owner = patients.assign(settings, 5)
    for other in (dataclasses.replace(settings, seed=2), dataclasses.replace(settings, population=2)):
        part = synthetic.generate(other, np.arange(5), owner)
        for mine, theirs in zip(batch.signal[:5], part.signal, strict=True):
            n = min(len(mine), len(theirs))
            assert not np.allclose(mine[:n], theirs[:n], atol=0.05)


def test_lengths_unit_and_types(batch):
    lengths = np.array([len(x) for x in batch.signal])
    assert set(lengths) == {730, 1024}
    assert 0.52 < (lengths == 730).mean() < 0.64
    assert all(x.dtype == np.float32 and x.shape[1] == 12 and np.isfinite(x).all() for x in batch.signal)
    assert 0.5 < np.median([np.ptp(x[:, 1]) for x in batch.signal]) < 2.5  # mV
    assert not any((x == 0).all(axis=1).any() for x in batch.signal)  # no padding


def test_limb_leads_follow_einthoven_and_goldberger(batch):
    lead = {name: np.concatenate([x[:, i] for x in batch.signal]) for i, name in enumerate(LEADS)}
    np.testing.assert_allclose(lead["I"] + lead["III"], lead["II"], atol=1e-5)
    np.testing.assert_allclose(lead["aVR"], -(lead["I"] + lead["II"]) / 2, atol=1e-5)
    np.testing.assert_allclose(lead["aVL"], (lead["I"] - lead["III"]) / 2, atol=1e-5)
    np.testing.assert_allclose(lead["aVF"], (lead["II"] + lead["III"]) / 2, atol=1e-5)


def _left_after(signals, kept):
    left = []
    for x in signals:
        y = x[:, INDEPENDENT].astype(np.float64)
        power = np.linalg.svd(y - y.mean(axis=0), compute_uv=False) ** 2
        left.append(power[kept:].sum() / power.sum())
    return 100 * np.median(left)


def _stored(signals):
    high, low = dsp.butter(1, 0.67 / 50, "high"), dsp.butter(5, 40 / 50)
    return [dsp.filtfilt(*low, dsp.filtfilt(*high, x, axis=0), axis=0) for x in signals]


def test_energy_left_after_principal_components_is_that_of_real_ecg(batch, clean):
    """As stored, 0.67-40 Hz: PTB-XL's 353 records give 2.0, 0.86 and 0.19 % after 2, 3 and 5 components."""
    stored = _stored(batch.signal)
    assert 0.5 <= _left_after(stored, 3) <= 1.5
    assert 0.1 <= _left_after(stored, 5) <= 0.3
    assert 0.25 <= _left_after(clean.signal, 3) <= 1.5
    assert 0.03 <= _left_after(clean.signal, 5) <= 0.3


def test_real_ecg_has_the_energies_that_the_simulator_was_matched_to(shared_data, tmp_path):
    import tarfile

    archives = sorted((shared_data / "ptbxl").glob("*.tar.xz"))
    if not archives:
        pytest.skip("no PTB-XL archive")
    wfdb = pytest.importorskip("wfdb")
    wanted = [f"records100/00000/{number:05d}_lr" for number in range(1, 60)]
    for archive in archives:
        with tarfile.open(archive, "r:xz") as tar:
            for member in tar:
                if member.name.removeprefix("./").rsplit(".", 1)[0] in wanted:
                    tar.extract(member, tmp_path, filter="data")
                    if len(list(tmp_path.rglob("*_lr.*"))) >= 80:
                        break
    found = [str(p.with_suffix("")) for p in sorted(tmp_path.rglob("*_lr.hea")) if p.with_suffix(".dat").exists()]
    if len(found) < 20:
        pytest.skip("records100 not in the archives")
    real = _stored([wfdb.rdrecord(name).p_signal for name in found])
    assert 0.4 <= _left_after(real, 3) <= 1.8
    assert 0.08 <= _left_after(real, 5) <= 0.5


def test_signal_to_noise_ratio_is_log_normal_around_18_db(batch, clean):
    ratio = []
    for loud, quiet, pops in zip(batch.signal, clean.signal, batch.state.pops, strict=True):
        if not pops:
            wave, rest = quiet[:, INDEPENDENT], (loud - quiet)[:, INDEPENDENT]
            ratio.append(10 * np.log10(wave.var(axis=0).mean() / rest.var(axis=0).mean()))
    wanted = batch.state.snr_db[~batch.state.pops]
    np.testing.assert_allclose(
        np.array(ratio)[~batch.state.swapped[~batch.state.pops]],
        wanted[~batch.state.swapped[~batch.state.pops]],
        atol=0.05,
    )
    assert 17 < np.median(ratio) < 19
    assert 3 < np.std(ratio) < 5
    assert abs(np.mean(ratio) - np.median(ratio)) < 0.6  # symmetric in dB


def test_drift_pops_and_mains_are_there(batch, clean, settings):
    rest = [a - b for a, b in zip(batch.signal, clean.signal, strict=True)]
    long = np.stack([x for x in rest if len(x) == 1024])[:, :, INDEPENDENT]
    frequency, power = dsp.welch(long, 100, nperseg=512, axis=1)
    power = np.median(power.mean(axis=2), axis=0)
    assert power[frequency < 0.5].sum() > 0.5 * power.sum()  # drift
    jumps = np.array([np.abs(np.diff(x[:, INDEPENDENT], axis=0)).max() for x in rest])
    pops = batch.state.pops
    assert 0.02 < pops.mean() < 0.09
    assert np.median(jumps[pops]) > 2 * np.median(jumps[~pops])
    # Mains alone: 60 Hz folds to 40 Hz; 50 Hz stays at the folding frequency.
    state = population.draw(settings, np.arange(40), np.arange(40))
    level = hashing.normals(hashing.key("levels", 1, 1), state.index, 4)
    for hertz, seen in ((60, 40.0), (50, 50.0)):
        wave = noise._mains(hertz, state, level, np.ones((40, 9, 1), np.float32), 1024)[:, 0]
        spectrum = np.abs(np.fft.rfft(wave * np.hanning(1024), axis=1)).mean(axis=0)
        assert abs(np.fft.rfftfreq(1024, 0.01)[spectrum.argmax()] - seen) < 0.2


def test_the_waves_themselves_have_no_aliases(clean):
    """A clean plain beat has next to nothing near the folding frequency."""
    plain = [x for x, p in zip(clean.signal, clean.state.pattern, strict=True) if p == 0 and len(x) == 1024][:100]
    frequency, power = dsp.welch(np.stack(plain), 100, nperseg=512, axis=1)
    power = power.mean(axis=(0, 2))
    assert power[frequency > 45].sum() < 2e-3 * power.sum()


def test_arm_electrodes_are_exchanged_in_one_record_of_a_hundred():
    settings = synthetic.Settings(seed=1, noise=0.0)
    index = np.arange(4000)
    state, _ = synthetic.states(settings, index, index)
    assert 0.006 < state.swapped.mean() < 0.014
    some = state.take(np.flatnonzero(state.swapped)[:20])
    right = synthetic.signals(settings, dataclasses.replace(some, swapped=np.zeros(20, bool)))
    for wrong, true in zip(synthetic.signals(settings, some), right, strict=True):
        np.testing.assert_allclose(wrong[:, 0], -true[:, 0], atol=1e-6)
        np.testing.assert_allclose(wrong[:, 1], true[:, 2], atol=1e-5)
        np.testing.assert_allclose(wrong[:, 3], true[:, 4], atol=1e-5)
        np.testing.assert_allclose(wrong[:, 5:], true[:, 5:], atol=1e-5)


def test_beats_vary_and_follow_the_rhythm():
    settings, state, _ = _balanced(1500)
    beats = rhythm.beats(settings, state)
    regular = (state.ectopy == 0) & (state.atrial == 0)
    rr = np.where(beats.inside, beats.rr, np.nan)
    cv = np.nanstd(rr, axis=1) / np.nanmean(rr, axis=1)
    sinus, wild = regular & (state.rhythm == SINUS), regular & (state.rhythm == FIBRILLATION)
    np.testing.assert_allclose(60 / np.nanmean(rr, axis=1)[sinus], state.rate[sinus], rtol=0.12)
    assert np.median(np.abs(60 / np.nanmean(rr, axis=1) - state.rate)[sinus]) < 1.5
    assert np.median(cv[sinus]) < 0.04 < 0.12 < np.median(cv[wild])
    assert (beats.onset[:, -1] > state.length / 100 + 1).all()  # enough beats were drawn
    premature = (state.ectopy > 0) & (beats.premature > 0)
    assert (cv[premature & (state.rhythm == SINUS)] > 0.04).all()
    # Without noise two beats of a record still differ.
    quiet = synthetic.signals(dataclasses.replace(settings, noise=0.0), state.take(np.flatnonzero(sinus)[:20]))
    spread = [np.std(x[dsp.find_peaks(np.abs(x[:, 10]), height=0.6 * np.abs(x[:, 10]).max())[0], 10]) for x in quiet]
    assert 0.005 < np.median(spread) < 0.2


def test_fibrillation_has_no_p_wave_but_fibrillatory_waves():
    settings, state, _ = _balanced(600, noise=0.0)
    waves = anatomy.waves(state)
    p = np.abs(waves.weight[:, anatomy.P_WAVES]).max(axis=(1, 2))
    assert (p[state.rhythm != SINUS] == 0).all()
    assert (p[state.rhythm == SINUS] > 0.02).all()
    some = state.take(np.flatnonzero((state.rhythm == FIBRILLATION) & (state.length == 1024))[:30])
    atrial = render._fibrillation(settings, some, 1024)
    frequency, power = dsp.welch(atrial[:, :, 2], 100, nperseg=512, axis=1)
    peak = frequency[power.argmax(axis=1)]
    assert ((peak > 3.5) & (peak < 9.5)).all()
    size = np.sqrt((atrial**2).mean(axis=1))  # mV
    assert 0.015 < np.median(size[:, 2]) < 0.08
    assert (size[:, 2] > size[:, 5:].max(axis=1)).all()  # V1 shows them best, V4 to V6 least


def _qrs(state):
    """Onset to end, in ms, of the QRS as a reader of the clean 12 leads would measure it; and the leads [n,
    t, 8]."""
    waves = anatomy.waves(state)
    time = np.arange(-0.05, 0.3, 0.001)
    slots = [*range(2, 8), 12, 13]
    course = np.exp(-0.5 * ((time - waves.centre[:, slots, None]) / waves.width[:, slots, None]) ** 2)
    leads = np.matmul(course.transpose(0, 2, 1), waves.weight[:, slots])
    size = np.sqrt((leads**2).mean(axis=2))
    on = size > 0.07 * size.max(axis=1, keepdims=True)
    return 1000 * (time[len(time) - 1 - on[:, ::-1].argmax(axis=1)] - time[on.argmax(axis=1)]), time, leads


def test_qrs_duration_and_block_patterns_can_be_read_off_the_leads():
    _, state, _ = _balanced(1200)
    measured, time, leads = _qrs(state)
    for pattern in range(3):
        rows = state.pattern == pattern
        assert np.corrcoef(measured[rows], state.qrs[rows])[0, 1] > 0.85
        assert abs((measured - state.qrs)[rows].mean()) < 10
    wide = state.qrs > 122
    v1, v6, one = leads[:, :, 2], leads[:, :, 7], leads[:, :, 0]
    late = time > 0.08
    right, left = wide & (state.pattern == RIGHT), wide & (state.pattern == LEFT)
    assert (v1[right][:, late].max(axis=1) > 0.15).mean() > 0.95  # R' in V1
    assert (one[right][:, late].min(axis=1) < -0.05).mean() > 0.9  # S in I
    assert (v1[left].sum(axis=1) < 0).mean() > 0.95  # QS or rS in V1
    assert (v6[left].min(axis=1) > -0.25).mean() > 0.9  # no q or S in V6
    assert (one[left].sum(axis=1) > 0).mean() > 0.9


def test_modes_change_the_waveform_visibly_but_little():
    settings = synthetic.Settings(seed=1, noise=0.0)
    state, _ = synthetic.states(settings, np.arange(300), np.arange(300))
    plain = dataclasses.replace(state, local=state.local * 0)
    weight, none = anatomy.waves(state).weight, anatomy.waves(plain).weight
    change = np.sqrt(((weight - none) ** 2).sum(axis=(1, 2)) / (none**2).sum(axis=(1, 2)))
    common = state.mode == 0
    assert 0.2 < common.mean() < 0.45
    assert 0.02 < np.median(change[common]) < np.median(change[~common]) < 0.35
    # Modes stand further from one another than people of one mode do.
    place = population.mode_directions(np.arange(400), settings)
    apart = np.linalg.norm(place[:, None] - place, axis=2) + 1e9 * np.eye(400)
    assert apart.min() > 4 * population.PATTERN_SPREAD
