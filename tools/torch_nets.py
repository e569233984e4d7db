"""The encoders of the ladder in PyTorch, and their training step: what `bench_step.py --against torch` runs.

Written as somebody who works in PyTorch would: `nn` modules, `scaled_dot_product_attention`, fused AdamW,
`torch.compile` with bf16 autocast and channels-last on a GPU. Without masks: every sample of the benchmark is
valid, and then they change nothing. Parameters come from the JAX network, and go back to be compared. Nobody but
the benchmark needs this file, or PyTorch.

Shapes: B records, T samples, C channels, S tokens, D width.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from ecg_jax.models.ladder import Config, ResNet1dConfig, TransformerConfig
from ecg_jax.models.layers import group_count

CONV, MATRIX, SAME = "conv", "matrix", "same"  # how an array lies in JAX: [K, C, D], [in, out], as in PyTorch
Named = Iterator[tuple[str, int | None, nn.Parameter, str]]


class Conv(nn.Module):
    """SAME-padded convolution without bias; uneven padding is added beforehand, even padding by the convolution."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, length: int, planar: bool):
        super().__init__()
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        self.left, self.right = total // 2, total - total // 2
        shape = (after, before, 1, kernel) if planar else (after, before, kernel)
        self.weight = nn.Parameter(torch.empty(shape))
        self.planar, self.stride = planar, stride

    def forward(self, x):
        even = self.left if self.left == self.right else 0
        if not even:
            x = F.pad(x, (self.left, self.right))
        if self.planar:
            return F.conv2d(x, self.weight, stride=(1, self.stride), padding=(0, even))
        return F.conv1d(x, self.weight, stride=self.stride, padding=even)


class ResNet(nn.Module):
    """`ecg_jax.models.resnet1d` on [B, T, 12] -> [B, D] (mean over frames).

    `planar`: as images of height 1, because PyTorch has channels-last for those only.
    """

    def __init__(self, config: ResNet1dConfig, length: int, planar: bool):
        super().__init__()
        self.planar, self.convs, self.norms = planar, nn.ModuleDict(), nn.ModuleDict()
        self.units: list[tuple[str, int]] = []

        def norm(name, width):
            batch_norm = nn.BatchNorm2d if planar else nn.BatchNorm1d
            self.norms[name] = (
                batch_norm(width) if config.norm == "batch" else nn.GroupNorm(group_count(width, config.groups), width)
            )

        before = config.width
        self.convs["stem"] = Conv(config.leads, before, config.kernel, 1, length, planar)
        norm("stem_norm", before)
        for stage, (width, stage_stride) in enumerate(zip(config.widths, config.strides, strict=True), 1):
            for unit in range(1, config.units + 1):
                name, stride = f"stage{stage}_unit{unit}", stage_stride if unit == 1 else 1
                self.convs[f"{name}_conv1"] = Conv(before, width, config.kernel, 1, length, planar)
                norm(f"{name}_norm1", width)
                self.convs[f"{name}_conv2"] = Conv(width, width, config.kernel, stride, length, planar)
                length //= stride
                if before != width:
                    self.convs[f"{name}_skip"] = Conv(before, width, 1, 1, length, planar)
                norm(f"{name}_norm2", width)
                self.units.append((name, stride))
                before = width

    def forward(self, x_BxTxC):
        x = x_BxTxC.transpose(1, 2)
        if self.planar:
            x = x.unsqueeze(2).to(memory_format=torch.channels_last)
        x = y = self.norms["stem_norm"](self.convs["stem"](x))
        for name, stride in self.units:
            x = F.relu(self.norms[f"{name}_norm1"](self.convs[f"{name}_conv1"](x)))
            x = self.convs[f"{name}_conv2"](x)
            if stride > 1:
                y = F.max_pool2d(y, (1, stride)) if self.planar else F.max_pool1d(y, stride)
            if f"{name}_skip" in self.convs:
                y = self.convs[f"{name}_skip"](y)
            y = x + y
            x = F.relu(self.norms[f"{name}_norm2"](y))
        return x.mean((2, 3) if self.planar else 2)

    def named(self) -> Named:
        """(name in JAX, layer of a stack, parameter here, how it lies in JAX)."""
        for name, conv in self.convs.items():
            yield f"{name}_kernel", None, conv.weight, CONV
        for name, norm in self.norms.items():
            yield f"{name}_scale", None, norm.weight, SAME
            yield f"{name}_bias", None, norm.bias, SAME


class Block(nn.Module):
    """One pre-LN layer."""

    def __init__(self, config: TransformerConfig):
        super().__init__()
        d = config.width
        self.heads = config.heads
        self.norm1, self.norm2 = nn.LayerNorm(d, eps=1e-5), nn.LayerNorm(d, eps=1e-5)
        self.qkv, self.out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp1, self.mlp2 = nn.Linear(d, config.mlp * d), nn.Linear(config.mlp * d, d)

    def forward(self, h):
        batch, tokens, d = h.shape
        q, k, v = self.qkv(self.norm1(h)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, tokens, d)
        h = h + self.out(x)
        return h + self.mlp2(F.gelu(self.mlp1(self.norm2(h)), approximate="tanh"))


class Transformer(nn.Module):
    """`ecg_jax.models.transformer` on [B, T, 12] -> [B, D] (mean over tokens, cls left out)."""

    def __init__(self, config: TransformerConfig, length: int):
        super().__init__()
        self.config, d = config, config.width
        self.patches = length // config.patch
        self.embed = nn.Linear(config.patch * config.leads_per_token, d)
        self.lead_table = nn.Parameter(torch.empty(config.lead_groups + 1, d))
        self.time_table = nn.Parameter(torch.empty(config.times + 1, d))
        self.cls = nn.Parameter(torch.empty(d))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(d, eps=1e-5)

    def forward(self, x_BxTxC):
        batch, d, n = len(x_BxTxC), self.config.width, self.patches
        x = x_BxTxC.view(batch, n, self.config.patch, self.config.lead_groups, self.config.leads_per_token)
        h = self.embed(x.permute(0, 3, 1, 4, 2).reshape(batch, self.config.lead_groups * n, -1))
        place = (self.lead_table[1:, None] + self.time_table[None, 1 : n + 1]).reshape(-1, d)
        h = torch.cat([self.cls.expand(batch, 1, d).to(h.dtype), h + place.to(h.dtype)], 1)
        for block in self.blocks:
            h = block(h)
        return self.norm(h)[:, 1:].float().mean(1)

    def named(self) -> Named:
        """As `ResNet.named`; the mask vector of the JAX network is not used by either."""
        for name in ("lead_table", "time_table", "cls"):
            yield name, None, getattr(self, name), SAME
        yield "patch_kernel", None, self.embed.weight, MATRIX
        yield "patch_bias", None, self.embed.bias, SAME
        yield "norm_scale", None, self.norm.weight, SAME
        yield "norm_bias", None, self.norm.bias, SAME
        for layer, block in enumerate(self.blocks):
            for part in ("norm1", "norm2"):
                yield f"layers_{part}_scale", layer, getattr(block, part).weight, SAME
                yield f"layers_{part}_bias", layer, getattr(block, part).bias, SAME
            for part in ("qkv", "out", "mlp1", "mlp2"):
                yield f"layers_{part}_kernel", layer, getattr(block, part).weight, MATRIX
                yield f"layers_{part}_bias", layer, getattr(block, part).bias, SAME


class Classifier(nn.Module):
    """Encoder, pooled features with the log gain beside them, a linear head, mean binary cross-entropy."""

    def __init__(self, encoder: nn.Module, features: int, labels: int):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(features + 1, labels)

    def forward(self, x, gain, labels):
        features = self.encoder(x).float()
        with torch.autocast(x.device.type, enabled=False):
            logits = self.head(torch.cat([features, gain[:, None]], 1))
            return F.binary_cross_entropy_with_logits(logits, labels)

    def named(self) -> Iterator[tuple[str, str, int | None, nn.Parameter, str]]:
        """(part, name, layer, parameter, how it lies in JAX)."""
        for entry in self.encoder.named():
            yield "encoder", *entry
        yield "head", "kernel", None, self.head.weight, MATRIX
        yield "head", "bias", None, self.head.bias, SAME


class Trainer:
    """The network with our starting parameters, one batch on the device, and its step.

    Args:
        params: of `objective.init`, NumPy. decay: tree of bool, which of them are decayed.
        batch: (x float32 [B, T, 12], log gain [B], labels [B, K]), prepared: in PyTorch's favour, whose step starts
            where ours has yet to gather, cast and scale.
        planar: channels-last, as images of height 1 (None: on a GPU).
    """

    def __init__(
        self,
        config: Config,
        params: dict,
        decay: dict,
        batch: tuple,
        optim: Any,
        bf16: bool,
        planar: bool | None,
        mode: str,
    ):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gpu = self.device.type == "cuda"
        self.batch = [torch.from_numpy(np.array(array, np.float32)).to(self.device) for array in batch]
        length = batch[0].shape[1]
        if isinstance(config, ResNet1dConfig):
            encoder = ResNet(config, length, gpu if planar is None else planar)
        else:
            encoder = Transformer(config, length)
        self.net = Classifier(encoder, config.features, batch[2].shape[1])
        groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
        with torch.no_grad():
            for part, name, layer, parameter, lies in self.net.named():
                parameter.copy_(torch.from_numpy(_turned(_layer(params[part][name], layer), lies, parameter.shape)))
                groups[decay[part][name]].append(parameter)
        self.net.to(self.device)
        if getattr(encoder, "planar", False):
            self.net.to(memory_format=torch.channels_last)
        self.optim = torch.optim.AdamW(
            [
                {"params": groups[True], "weight_decay": optim.weight_decay},
                {"params": groups[False], "weight_decay": 0.0},
            ],
            lr=optim.lr,
            betas=(optim.b1, optim.b2),
            eps=optim.eps,
            fused=True,
        )
        self.clip, self.gpu, self.bf16 = optim.clip, gpu, bf16
        self.forward = torch.compile(self.net, mode=mode) if gpu else self.net

    def first(self, at: slice) -> tuple[float, dict[tuple[str, str], np.ndarray]]:
        """Loss and gradients of the parameters as they are on these records of the batch, in full float32, laid out as
        in JAX; nothing is kept.
        """
        state = {name: buffer.clone() for name, buffer in self.net.named_buffers()}
        loss = self.net(*(array[at] for array in self.batch))
        loss.backward()
        single, stacks = {}, {}
        for part, name, layer, parameter, lies in self.net.named():
            grad = parameter.grad.detach().cpu().numpy()
            grad = _turned(grad.squeeze(2) if grad.ndim == 4 else grad, lies, None)
            if layer is None:
                single[part, name] = grad
            else:
                stacks.setdefault((part, name), []).append(grad)
        self.net.zero_grad(set_to_none=True)
        for name, buffer in self.net.named_buffers():
            buffer.copy_(state[name])
        return loss.item(), single | {key: np.stack(grads) for key, grads in stacks.items()}

    def run(self, steps: int) -> None:
        """Train for `steps` steps and wait for the last."""
        context = torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        for _ in range(steps):
            self.optim.zero_grad(set_to_none=True)
            with context:
                loss = self.forward(*self.batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.net.parameters(), self.clip)
            self.optim.step()
        if self.gpu:
            torch.cuda.synchronize()


def setup(threads: int, tf32: bool) -> str:
    """Threads and precision of products; returns the version and what it runs on."""
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return f"torch {torch.__version__} on {where}"


def _layer(value: np.ndarray, layer: int | None) -> np.ndarray:
    return np.array(value if layer is None else value[layer], np.float32)  # a copy: PyTorch wants to write to it


def _turned(value: np.ndarray, lies: str, shape: tuple[int, ...] | None) -> np.ndarray:
    """From the layout of one side to that of the other (turning twice gives the same), in the shape asked for."""
    turned = value.transpose() if lies in (CONV, MATRIX) else value
    return np.ascontiguousarray(turned).reshape(shape or turned.shape)
