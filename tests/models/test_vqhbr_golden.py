"""VQ-HBR beside tensors that the published PyTorch code gave (random weights, simulated ECG), within their tolerances:
stages 1e-5, losses 1e-6, gradients 1e-6, and after six optimiser steps parameters 1e-5, losses 5e-6; codes exact.
"""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ecg_jax.models import heartlang, quantiser, sentence, vqhbr
from ecg_jax.training import optim

SIZES = {"width": 64, "encoder_layers": 2, "decoder_layers": 1, "heads": 2, "head_size": 24, "mlp": 96}
CONFIG = vqhbr.Config(**SIZES, codes=256, code_dim=16, faithful=True)


@pytest.fixture(scope="module")
def golden(shared_data):
    with np.load(shared_data / "heartlang" / "heartlang_vqhbr.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def sentences(golden):
    """With indexes from 0, and every slot counted, as published."""
    there = golden["in_chans"] > 0
    return vqhbr.Sentences(golden["x"], golden["in_chans"] - 1, golden["in_times"] - 1, there, np.ones_like(there))


@pytest.fixture(scope="module")
def params(golden):
    state = {key.removeprefix("param/"): value for key, value in golden.items() if key.startswith("param/")}
    return heartlang.from_state(CONFIG, state)


@pytest.fixture(scope="module")
def stages(params, sentences):
    tokens, lead, time, there, _ = sentences

    def of(p, lead, time):
        every = sentence.forward(CONFIG.encoder, p["encoder"], tokens, there, lead, time)
        kept = vqhbr._backbone(CONFIG.encoder, p["encoder"], tokens, lead, time, there, jnp.float32)
        z = vqhbr.encode(CONFIG, p, tokens, lead, time, there)
        codes = vqhbr.assign(CONFIG, p, z)
        found = {"enc_all_tokens": every, "enc_tokens": kept, "enc_pooled": kept.mean(1), "z": z, "codes": codes}
        found["to_quantizer"] = vqhbr._head(p["encode_head"], kept)
        found["z_q"] = p["codebook"][codes]
        shown = (found["z_q"], lead, time, there)
        found["dec_tokens"] = vqhbr._backbone(CONFIG.decoder, p["decoder"], *shown, jnp.float32)
        return found | {"recon": vqhbr.decode(CONFIG, p, *shown)}

    run = jax.jit(of)
    return run(params, lead, time), run(params, None, None)


def near(found, wanted, atol, rtol=0.0):
    np.testing.assert_allclose(np.asarray(found), wanted, rtol=rtol, atol=atol)


def test_every_stage(golden, stages):
    with_indexes, without = stages
    for name, found in with_indexes.items():
        if name == "codes":
            assert np.array_equal(found, golden["eval/codes"])
        else:
            near(found, golden[f"eval/{name}"], 1e-5, 1e-5)
    for name in ("enc_tokens", "z"):
        near(without[name], golden[f"nochan/{name}"], 1e-5, 1e-5)
    assert np.array_equal(without["codes"], golden["nochan/codes"])
    usage = 0.99 * golden["param/quantize.cluster_size"] + 0.01 * np.bincount(
        np.ravel(with_indexes["codes"]), None, 256
    )
    near(usage, golden["eval/cluster_size_after_forward"], 1e-6)


def test_masked_tokens(golden, params, sentences):
    tokens, lead, time, there, _ = sentences
    masked = golden["encmask/mask"]
    data = (tokens, there, lead, time)
    found = jax.jit(lambda p: sentence.forward(CONFIG.encoder, p, *data, masked_BxS=masked))(params["encoder"])
    near(found[:, 1:] * np.any(tokens != 0, axis=2, keepdims=True), golden["encmask/enc_tokens"], 1e-5, 1e-5)


@pytest.fixture(scope="module")
def step(sentences, golden):
    said = json.loads(str(golden["meta"]))["opt"]
    hyper = optim.Hyper(*map(np.float32, (said["weight_decay"], *said["betas"], said["eps"], 0, 1)))

    @jax.jit
    def step(state, count, lr):
        params, mu, nu = state
        slope = jax.value_and_grad(lambda p: vqhbr.loss(CONFIG, p, sentences), has_aux=True)
        (loss, aux), grads = slope(params)
        # What no gradient moves is kept from the optimiser here, whatever it makes of it by name.
        norm = optim.global_norm(grads)
        new, mu, nu = optim.adamw(params, grads, mu, nu, count, norm, lr, hyper)
        new |= {name: params[name] for name in ("codebook", "usage")}
        new, aux = vqhbr.absorb(CONFIG, new, aux)
        return (new, mu, nu), loss, aux, grads

    return step


def test_losses_gradients_and_six_steps(golden, params, step):
    zeros = jax.tree.map(np.zeros_like, params)
    state, losses = (params, zeros, zeros), []
    for i in range(6):
        state, loss, aux, grads = step(state, np.int32(i), np.float32(golden["opt/lr_schedule"][i]))
        if i == 0:  # its rate is 0: what changed is what a forward pass in training changes
            near(loss, golden["train/loss"], 1e-6)
            near(aux["commitment"], golden["train/quant_loss"], 1e-6)
            near(aux["reconstruction"], golden["train/rec_loss"], 1e-6)
            near(state[0]["codebook"], golden["train/codebook_after"], 1e-6)
            near(state[0]["usage"], golden["train/cluster_size_after"], 1e-6)
            for key, found in heartlang.state(CONFIG, grads).items():
                if not key.startswith("quantize."):
                    near(found, golden[f"train/grad/{key}"], 1e-6)
            assert not np.any(grads["codebook"]) and not np.any(grads["usage"])
        losses.append((loss, aux["commitment"], aux["reconstruction"]))
    for name, found in zip(("losses", "quant_losses", "rec_losses"), zip(*losses, strict=True), strict=True):
        near(np.asarray(found), golden[f"opt/{name}"], 5e-6)
    for key, found in heartlang.state(CONFIG, state[0]).items():
        near(found, golden[f"opt/param_after/{key}"], 1e-5)


def test_kmeans(golden):
    samples = golden["kmeans/samples"][None]
    weight, start = np.ones(samples.shape[:2], np.float32), samples[0, golden["kmeans/init_rows"]]
    for iterations in (1, 10):
        means, members = jax.jit(quantiser.kmeans, static_argnums=(3, 4))(samples, weight, start, iterations, True)
        near(means, golden[f"kmeans/means_after_{iterations}"], 1e-6)
        assert np.array_equal(members, golden[f"kmeans/bins_after_{iterations}"])
