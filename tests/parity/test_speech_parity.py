"""wav2vec 2.0 and Whisper against transformers, on files that its classes wrote with random weights.

The tiny.en test compares with CTranslate2, on the published weights.
"""

import copy

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="PyTorch is not installed (make test-all installs it)")
transformers = pytest.importorskip("transformers", reason="transformers is not installed (make test-all installs it)")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from flax import nnx  # noqa: E402

from data_pipelines.encoders import mel  # noqa: E402
from omnihuman_jax.weights import wav2vec2, whisper  # noqa: E402

pytestmark = pytest.mark.slow

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "conv_dim": [16, 16, 24],
    "conv_kernel": [10, 3, 2],
    "conv_stride": [5, 2, 2],
    "num_conv_pos_embedding_groups": 4,
}
FORMS = {
    "base": SMALL | {"num_conv_pos_embeddings": 16},
    "large": SMALL
    | {
        "num_conv_pos_embeddings": 17,
        "feat_extract_norm": "layer",
        "do_stable_layer_norm": True,
        "conv_bias": True,
    },
}
WHISPER = {
    "num_mel_bins": 80,
    "d_model": 24,
    "encoder_layers": 2,
    "encoder_attention_heads": 3,
    "encoder_ffn_dim": 40,
    "decoder_layers": 1,
    "decoder_attention_heads": 3,
    "decoder_ffn_dim": 40,
    "vocab_size": 60,
    "max_source_positions": 30,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}


def randomised(model):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def relative(ours, theirs) -> float:
    theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
    assert ours.shape == theirs.shape
    return float(np.linalg.norm(np.asarray(ours) - theirs) / np.linalg.norm(theirs))


@pytest.fixture(scope="module", params=list(FORMS))
def wav2vec2_pair(request, tmp_path_factory):
    """transformers' model with random weights, and ours read from what it wrote."""
    theirs = randomised(transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**FORMS[request.param])))
    folder = tmp_path_factory.mktemp("wav2vec2")
    theirs.save_pretrained(folder)
    return theirs, wav2vec2.load(folder)


def wave(batch: int, samples: int) -> np.ndarray:
    return np.random.default_rng(samples).normal(size=(batch, samples)).astype(np.float32)


@pytest.mark.parametrize(
    ("batch", "samples", "lengths"), [(1, 801, None), (2, 1234, None), (3, 1000, (1000, 613, 333))]
)
def test_every_hidden_state_of_wav2vec2_agrees(wav2vec2_pair, batch, samples, lengths):
    theirs, ours = wav2vec2_pair
    x, mask = wave(batch, samples), None
    if lengths is not None:
        mask = torch.from_numpy((np.arange(samples) < np.array(lengths)[:, None]).astype(np.int64))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x), attention_mask=mask, output_hidden_states=True)
    last, states = ours(jnp.asarray(x), None if lengths is None else jnp.asarray(lengths))
    assert last.shape[1] == ours.config.rows(samples)
    errors = [relative(last, expected.last_hidden_state)]
    assert len(states) == len(expected.hidden_states) == ours.config.num_hidden_layers + 1
    errors += [relative(a, b) for a, b in zip(states, expected.hidden_states, strict=True)]
    print(errors)
    assert max(errors) < 1e-4, errors


def compare_gradients(ours, theirs, x, entries, ours_loss, theirs_loss, skip=()):
    """Relative errors of the gradient of the input and of every parameter."""
    given = torch.from_numpy(x).requires_grad_()
    theirs.zero_grad()
    theirs_loss(given).backward()
    graph, state = nnx.split(ours)
    of_state, of_x = jax.jit(jax.grad(lambda s, x: ours_loss(nnx.merge(graph, s), x), (0, 1)))(state, x)
    assert relative(of_x, given.grad) < 1e-3
    flat = {".".join(map(str, keys)): np.asarray(leaf[...]) for keys, leaf in nnx.to_flat_state(of_state)}
    reference = {name: p.grad.numpy() for name, p in theirs.named_parameters() if p.grad is not None}
    # A key's bias changes no attention weight: its gradient is rounding, so errors are relative to the largest one.
    size = max(np.linalg.norm(value) / value.size**0.5 for value in reference.values())
    errors = {"input": relative(of_x, given.grad)}
    for entry in entries:
        if entry.theirs in skip:
            continue
        expected, name = entry.layout.to_ours(reference.pop(entry.theirs), entry.patch), entry.ours[0]
        scale = max(np.linalg.norm(expected), 1e-4 * size * expected.size**0.5)
        errors[name] = float(np.linalg.norm(flat[name] - expected) / scale)
    worst = max(errors, key=errors.get)
    print(errors["input"], worst, errors[worst])
    assert errors[worst] < 1e-3, (worst, errors[worst])
    assert not set(reference) - {"masked_spec_embed"}


def test_every_gradient_of_wav2vec2_agrees(wav2vec2_pair):
    theirs, ours = wav2vec2_pair
    compare_gradients(
        ours,
        theirs,
        wave(2, 901),
        wav2vec2.entries(ours.config),
        lambda model, x: jnp.sin(model(x)[0]).sum(),
        lambda x: theirs(x).last_hidden_state.sin().sum(),
    )


def assert_bfloat16_agrees(ours, theirs, x):
    """bfloat16 against float32: ours no further off than the reference is from itself, but for rounding's luck."""
    with torch.no_grad():
        exact = theirs(torch.from_numpy(x)).last_hidden_state
        half = copy.deepcopy(theirs).to(torch.bfloat16)(torch.from_numpy(x).to(torch.bfloat16)).last_hidden_state
    got = ours(jnp.asarray(x, jnp.bfloat16))[0]
    assert got.dtype == jnp.bfloat16
    error, reference = relative(got.astype(jnp.float32), exact), relative(half.float(), exact)
    print(f"bfloat16 against float32: ours {error:.1e}, theirs {reference:.1e}")
    assert error < max(2 * reference, 0.02)


def test_wav2vec2_in_bfloat16_agrees_as_well_as_the_reference_with_itself(wav2vec2_pair):
    theirs, ours = wav2vec2_pair
    assert_bfloat16_agrees(ours, theirs, wave(2, 1234))


def test_a_checkpoint_with_a_head_is_read_without_it(tmp_path):
    config = transformers.Wav2Vec2Config(**FORMS["base"], vocab_size=7)
    theirs = randomised(transformers.Wav2Vec2ForCTC(config))
    theirs.save_pretrained(tmp_path)
    ours, x = wav2vec2.load(tmp_path), wave(1, 640)
    with torch.no_grad():
        expected = theirs.wav2vec2(torch.from_numpy(x)).last_hidden_state
    assert relative(ours(jnp.asarray(x))[0], expected) < 1e-4


def test_the_sound_is_normalised_as_the_reference_does():
    from omnihuman_jax.models.speech.wav2vec2 import normalised

    x = 3 * wave(1, 1000)[0] + 0.5
    expected = transformers.Wav2Vec2FeatureExtractor()(x, sampling_rate=16_000)["input_values"][0]
    np.testing.assert_allclose(normalised(x), expected, atol=1e-5)


@pytest.fixture(scope="module")
def whisper_pair(tmp_path_factory):
    theirs = randomised(transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**WHISPER)))
    folder = tmp_path_factory.mktemp("whisper")
    theirs.save_pretrained(folder)
    return theirs.model.encoder, whisper.load(folder)


@pytest.mark.parametrize("batch", [1, 3])
def test_every_hidden_state_of_whisper_agrees(whisper_pair, batch):
    theirs, ours = whisper_pair
    x = np.random.default_rng(batch).normal(size=(batch, 80, 60)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(x), output_hidden_states=True)
    last, states = ours(jnp.asarray(x))
    assert len(states) == len(expected.hidden_states) == 3
    errors = [relative(last, expected.last_hidden_state)]
    errors += [relative(a, b) for a, b in zip(states[:-1], expected.hidden_states[:-1], strict=True)]
    print(errors)
    assert max(errors) < 1e-4, errors


def test_every_gradient_of_whisper_agrees(whisper_pair):
    theirs, ours = whisper_pair
    compare_gradients(
        ours,
        theirs,
        np.random.default_rng(0).normal(size=(2, 80, 60)).astype(np.float32),
        whisper.entries(ours.config, ""),
        lambda model, x: jnp.sin(model(x)[0]).sum(),
        lambda x: theirs(x).last_hidden_state.sin().sum(),
        skip=("embed_positions.weight",),  # fixed in the reference
    )


def test_whisper_in_bfloat16_agrees_as_well_as_the_reference_with_itself(whisper_pair):
    theirs, ours = whisper_pair
    assert_bfloat16_agrees(ours, theirs, np.random.default_rng(0).normal(size=(2, 80, 60)).astype(np.float32))


def test_an_odd_number_of_steps_is_the_padded_reference_without_positions_beyond(whisper_pair):
    """Lengths that the reference refuses: its layers, run by hand on the shorter input, give the same."""
    theirs, ours = whisper_pair
    x = np.random.default_rng(0).normal(size=(1, 80, 41)).astype(np.float32)
    with torch.no_grad():
        h = torch.nn.functional.gelu(theirs.conv2(torch.nn.functional.gelu(theirs.conv1(torch.from_numpy(x)))))
        h = h.permute(0, 2, 1)
        h = h + theirs.embed_positions.weight[: h.shape[1]]
        for layer in theirs.layers:
            h = layer(h, None)
        expected = theirs.layer_norm(h)
    assert expected.shape[1] == 21
    assert relative(ours(jnp.asarray(x))[0], expected) < 1e-4


@pytest.mark.parametrize("channels", [80, 128])
def test_the_front_end_is_that_of_the_reference(channels):
    x = 0.1 * wave(1, 16_000)[0]
    extractor = transformers.WhisperFeatureExtractor(feature_size=channels)
    expected = extractor(x, sampling_rate=16_000, padding=False)["input_features"][0]
    ours = mel.log_mel(x, channels)
    assert ours.shape == (channels, 100)
    print(np.abs(ours - expected).max())
    np.testing.assert_allclose(ours, expected, atol=2e-4)
