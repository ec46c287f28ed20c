"""The whole network again, written from its description in float64 NumPy with loops: what the JAX code must equal."""

import math

import numpy as np


def linear(p, x):
    y = x @ p["kernel"]
    return y + p["bias"] if "bias" in p else y


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, eps=1e-6):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps)


def rms(x, scale, eps=1e-6):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def rotate(x, positions, axes, theta):
    """x (N, heads, D), positions (N, 3); each pair is a complex number turned by its angle."""
    angles = np.concatenate(
        [positions[:, a, None] * theta ** (-2 * np.arange(n // 2) / n) for a, n in enumerate(axes)], -1
    )
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles)[:, None]
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def attention(q, k, v, see):
    """q (Nq, heads, D), k and v (Nk, heads, D), see (Nq, Nk) bool; a row that sees nothing is 0."""
    out = np.zeros_like(q)
    for i in range(q.shape[0]):
        keys = np.flatnonzero(see[i])
        for head in range(q.shape[1]) if len(keys) else ():
            logits = k[keys, head] @ q[i, head] / math.sqrt(q.shape[-1])
            weights = np.exp(logits - logits.max())
            out[i, head] = weights @ v[keys, head] / weights.sum()
    return out


def conv3x3(p, x, stride):
    """x (rows, columns, in) with a zero border of one."""
    rows, columns, _ = x.shape
    padded = np.pad(x, ((1, 1), (1, 1), (0, 0)))
    out = np.zeros((-(-rows // stride), -(-columns // stride), p["kernel"].shape[-1]))
    for i in range(out.shape[0]):
        for j in range(out.shape[1]):
            window = padded[i * stride : i * stride + 3, j * stride : j * stride + 3]
            out[i, j] = np.einsum("hwc,hwcd->d", window, p["kernel"]) + p["bias"]
    return out


def heatmap(keypoints, rows, columns, sigma):
    """keypoints (K, 3) -> (rows, columns, K)."""
    out = np.zeros((rows, columns, len(keypoints)))
    for n, (x, y, confidence) in enumerate(keypoints):
        for i in range(rows):
            for j in range(columns):
                d2 = (i + 0.5 - y * rows) ** 2 + (j + 0.5 - x * columns) ** 2
                out[i, j, n] = confidence * math.exp(-d2 / (2 * sigma**2))
    return out


def sinusoid(x):
    frequencies = np.exp(-math.log(10000) * np.arange(128) / 128)
    return np.concatenate([np.cos(x * frequencies), np.sin(x * frequencies)])


def embedder(p, x):
    return linear(p["fc2"], silu(linear(p["fc1"], x)))


def patches(x):
    """(T, H, W, C) -> (N, 4C) for patch size (1, 2, 2)."""
    t, h, w, _ = x.shape
    corners = [(a, 2 * i, 2 * j) for a in range(t) for i in range(h // 2) for j in range(w // 2)]
    return np.array([x[a, i : i + 2, j : j + 2].ravel() for a, i, j in corners])


class Reference:
    """One sample at a time; `params` a nested dict of float64 arrays, config a ModelConfig with patch (1, 2, 2)."""

    def __init__(self, config, params):
        self.config, self.p = config, params

    def qkv(self, p, x, positions, prefix=""):
        c = self.config
        q, k, v = (linear(p[prefix + name], x).reshape(-1, c.num_heads, c.head_dim) for name in "qkv")
        q, k = rms(q, p[prefix + "q_norm"]["scale"]), rms(k, p[prefix + "k_norm"]["scale"])
        if positions is not None:
            q, k = (rotate(z, positions, c.rope_axes, c.rope_theta) for z in (q, k))
        return q, k, v

    def hear(self, p, x, frames, audio, audio_frames):
        """Adds to visual tokens x (N, hidden) of latent frame `frames` (-1: none) what they hear."""
        c = self.config
        q, _, _ = self.qkv({**p, "k": p["q"], "v": p["q"], "k_norm": p["q_norm"]}, layer_norm(x), None)
        _, k, v = self.qkv({**p, "q": p["k"], "q_norm": p["k_norm"]}, audio, None)
        out = attention(q, k, v, frames[:, None] == audio_frames[None])
        out = linear(p["out"], out.reshape(len(x), c.num_heads * c.head_dim))
        return x + np.where(frames[:, None] >= 0, out, 0)

    def audio_tokens(self, features):
        c, p = self.config, self.p["audio"]
        per_frame = linear(p["fc2"], gelu(linear(p["fc1"], features)))
        tokens, frames = [], []
        for k in range((len(features) - 2 * c.audio_context) // 4):
            window = np.concatenate([per_frame[4 * k + i] for i in range(4 + 2 * c.audio_context)])
            token = linear(p["window2"], gelu(linear(p["window1"], window))).reshape(c.audio_tokens, c.hidden_size)
            tokens.append(layer_norm(token))
            frames += [k] * c.audio_tokens
        return np.concatenate(tokens), np.array(frames)

    def pose(self, keypoints, rows, columns):
        c, p = self.config, self.p["pose"]
        features = []
        for frame in keypoints:
            x = heatmap(frame, rows * c.pose_scale, columns * c.pose_scale, c.pose_sigma)
            for i in range(len(c.pose_widths)):
                x = silu(conv3x3(p[f"conv{i}"], x, 2 if i < int(math.log2(c.pose_scale)) else 1))
            features.append(conv3x3(p["out"], x, 1))
        return np.array(
            [linear(p["merge"], np.concatenate(features[4 * k : 4 * k + 4], -1)) for k in range(len(features) // 4)]
        )

    def __call__(self, x_t, t, batch):
        """x_t (T, H, W, C), t scalar, batch of one sample without the batch axis -> velocity (T, H, W, C)."""
        c, p = self.config, self.p
        has_text, has_reference, has_audio, has_pose = batch["active"]
        frames, rows, columns, channels = x_t.shape
        grid = [(i, j) for i in range(rows // 2) for j in range(columns // 2)]
        visual, positions, clean, hearing = [], [], [], []

        def add(latents, times, is_clean):
            visual.append(linear(p["x_embed"], patches(latents)))
            for time in times:
                positions.extend((time, i, j) for i, j in grid)
                clean.extend([is_clean] * len(grid))
                hearing.extend([-1 if is_clean or not has_audio else int(time)] * len(grid))

        if has_reference:
            add(batch["reference"][None], [c.reference_time_slot], True)
        if batch["has_motion"]:
            add(batch["motion"], range(-c.motion_frames, 0), True)
        add(x_t, range(frames), False)
        if has_pose:
            visual[-1] = visual[-1] + patches(self.pose(batch["keypoints"], rows, columns)) @ p["pose_embed"]["kernel"]
        video = len(visual[-1])
        visual, positions, clean = np.concatenate(visual), np.array(positions, float), np.array(clean)
        hearing = np.array(hearing)
        text = linear(p["text_embed"], batch["text"][batch["text_mask"]]) if has_text else p["null_text"][None]
        audio = self.audio_tokens(batch["audio"])
        noisy_vec, clean_vec = (silu(embedder(p["time_embed"], sinusoid(1000 * time))) for time in (t, 0.0))
        fixed = positions, clean, hearing, audio, noisy_vec, clean_vec
        for layer in range(c.num_dual_blocks):
            visual, text = self.dual(_layer(p["dual"], layer), visual, text, *fixed)
        for layer in range(c.num_single_blocks):
            visual, text = self.single(_layer(p["single"], layer), visual, text, *fixed)
        shift, scale = np.split(linear(p["final"]["mod"], noisy_vec), 2)
        out = linear(p["final"]["proj"], layer_norm(visual[-video:]) * (1 + scale) + shift)
        velocity = np.zeros(x_t.shape)
        for n, (time, i, j) in enumerate(positions[-video:].astype(int)):
            velocity[time, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2] = out[n].reshape(2, 2, channels)
        return velocity

    def dual(self, p, visual, text, positions, clean, hearing, audio, noisy_vec, clean_vec):
        dim, n = visual.shape[1], len(visual)
        vm = np.array([linear(p["img_mod"], clean_vec if is_clean else noisy_vec) for is_clean in clean]).reshape(
            n, 6, dim
        )
        tm = linear(p["txt_mod"], noisy_vec).reshape(6, dim)
        vq = self.qkv(p, layer_norm(visual) * (1 + vm[:, 1]) + vm[:, 0], positions, "img_")
        tq = self.qkv(p, layer_norm(text) * (1 + tm[1]) + tm[0], None, "txt_")
        q, k, v = (np.concatenate(pair) for pair in zip(vq, tq, strict=True))
        out = attention(q, k, v, np.ones((len(q), len(k)), bool)).reshape(len(q), -1)
        visual = visual + vm[:, 2] * linear(p["img_out"], out[:n])
        text = text + tm[2] * linear(p["txt_out"], out[n:])
        visual = self.hear(p["audio"], visual, hearing, *audio)
        mlp = p["img_mlp"]
        h = layer_norm(visual) * (1 + vm[:, 4]) + vm[:, 3]
        visual = visual + vm[:, 5] * linear(mlp["fc2"], gelu(linear(mlp["fc1"], h)))
        mlp = p["txt_mlp"]
        h = layer_norm(text) * (1 + tm[4]) + tm[3]
        return visual, text + tm[5] * linear(mlp["fc2"], gelu(linear(mlp["fc1"], h)))

    def single(self, p, visual, text, positions, clean, hearing, audio, noisy_vec, clean_vec):
        n, dim = visual.shape
        x = np.concatenate([visual, text])
        clean = np.concatenate([clean, np.zeros(len(text), bool)])
        mod = np.array([linear(p["mod"], clean_vec if is_clean else noisy_vec) for is_clean in clean]).reshape(
            -1, 3, dim
        )
        h = layer_norm(x) * (1 + mod[:, 1]) + mod[:, 0]
        # A rotation by position 0 leaves text tokens as they are.
        q, k, v = self.qkv(p, h, np.concatenate([positions, np.zeros((len(text), 3))]))
        out = attention(q, k, v, np.ones((len(q), len(k)), bool)).reshape(len(q), -1)
        kernel = np.concatenate([p["out"]["kernel"], p["mlp_out"]["kernel"]])
        out = np.concatenate([out, gelu(linear(p["mlp_in"], h))], -1) @ kernel + p["out"]["bias"]
        x = x + mod[:, 2] * out
        return self.hear(p["audio"], x[:n], hearing, *audio), x[n:]


def _layer(tree, index):
    return {k: _layer(v, index) if isinstance(v, dict) else v[index] for k, v in tree.items()}
