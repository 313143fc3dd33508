"""The U-Nets of other papers: their names and shapes, what they compute, their checkpoints, and that they serve."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

import coupfast
from coupfast.engine.cuda.flat import flatten
from coupfast.engine.cuda.traced import TracedScore
from coupfast.models import diffusers_unet, registry
from coupfast.models.adapters import edm_eps_hat, whole_step
from coupfast.models.ddpm_unet import DDPMUNet
from coupfast.models.ddpmpp import DDPMpp
from coupfast.models.registry import CheckpointError, skeleton
from coupfast.models.zoo import load_score
from coupfast.tracing import trace

#: Small ones on 3 x 8 x 8 images, with attention, and levels down and up.
SMALL = {
    "DDPMUNet": {"ch": 16, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4], "image_size": 8},
    "SongUNet": {"model_channels": 16, "channel_mult": [2, 2], "num_blocks": 1, "attn_resolutions": [4], "image_size": 8},
    "GuidedUNet": {
        "model_channels": 32,
        "channel_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "head_channels": 16,
        "image_size": 8,
    },
}


def small(arch, dtype=torch.float64):
    return registry.random_network({"arch": arch, **SMALL[arch]}, seed=3).eval().requires_grad_(False).to(dtype)


def states(batch=2, dtype=torch.float64):
    return torch.randn(batch, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(batch))


@pytest.fixture(params=SMALL, ids=str)
def network(request):
    return small(request.param)


def formats_are_foreseen():
    """Whether on a CPU a 1 x 1 convolution of a norm of a map in channels last lies as tensors without data say. Otherwise a
    view behind it may be impossible."""

    def format_of(x, weight):
        return F.conv2d(F.group_norm(x, 2), weight).stride()

    inputs = torch.rand(2, 64, 4, 4).to(memory_format=torch.channels_last), torch.rand(192, 64, 1).unsqueeze(3)
    with FakeTensorMode() as mode:
        foreseen = format_of(*map(mode.from_tensor, inputs))
    return foreseen == format_of(*inputs)


def counted(name):
    found = skeleton("score", name)
    return sum(parameter.numel() for parameter in found.parameters()), len(list(found.parameters()))


class TestDDPM:
    def test_parameters(self):
        """35.7 M as published; diffusers' google/ddpm-cifar10-32 and ddpm-celebahq-256 have these numbers."""
        assert counted("cifar10-ddpm") == (35_746_307, 328)
        assert counted("celebahq-ddpm")[0] == 113_673_219

    def test_names(self):
        shapes = {name: tuple(value.shape) for name, value in skeleton("score", "cifar10-ddpm").state_dict().items()}
        for name, shape in {
            "temb.dense.0.weight": (512, 128),
            "conv_in.weight": (128, 3, 3, 3),
            "down.0.block.1.temb_proj.weight": (128, 512),
            "down.0.downsample.conv.weight": (128, 128, 3, 3),
            "down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
            "down.1.attn.1.q.weight": (256, 256, 1, 1),
            "mid.attn_1.proj_out.bias": (256,),
            "mid.block_2.norm2.weight": (256,),
            "up.3.block.0.conv1.weight": (256, 512, 3, 3),
            "up.1.attn.2.norm.bias": (256,),
            "up.0.block.0.nin_shortcut.weight": (128, 384, 1, 1),
            "up.1.upsample.conv.bias": (256,),
            "norm_out.weight": (128,),
            "conv_out.weight": (3, 128, 3, 3),
        }.items():
            assert shapes.pop(name) == shape
        assert not any(name.startswith(("down.3.downsample", "up.0.upsample", "down.0.attn", "up.0.attn")) for name in shapes)

    def test_it_is_the_network_of_diffusers(self):
        """Weights moved to an independent implementation of the same paper give the same output."""
        try:
            diffusers = diffusers_unet._diffusers()
        except ImportError as error:
            pytest.skip(str(error))
        ours = DDPMUNet(ch=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8).eval()
        theirs = diffusers.UNet2DModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            downsample_padding=0,
            flip_sin_to_cos=False,
            freq_shift=1,
            norm_eps=1e-6,
            attention_head_dim=None,
        ).eval()
        theirs.load_state_dict(_as_diffusers(ours))
        x, index = states(3, torch.float32), torch.tensor([0, 99, 999])
        with torch.no_grad():
            torch.testing.assert_close(ours.predict(x, index), theirs(x, index).sample, rtol=1e-5, atol=1e-5)

    def test_it_is_told_the_index(self):
        network = small("DDPMUNet")
        x = states()
        labels = 999 * torch.tensor([0.1, 0.5], dtype=torch.float64)
        torch.testing.assert_close(network(x, labels), network.predict(x, torch.tensor([99, 499])), rtol=0, atol=0)
        assert torch.equal(whole_step(labels, "index"), torch.tensor([99, 499]))


def _as_diffusers(ours):
    """The state dict of diffusers' layout of a network of two levels with one block each."""
    state = {}

    def put(target, source):
        for part in ("weight", "bias"):
            value = source.state_dict()[part]
            state[f"{target}.{part}"] = value[:, :, 0, 0] if "attentions" in target and value.ndim == 4 else value

    def res(target, block):
        pairs = {"norm1": "norm1", "conv1": "conv1", "time_emb_proj": "temb_proj", "norm2": "norm2", "conv2": "conv2"}
        for name, own in pairs.items():
            put(f"{target}.{name}", getattr(block, own))
        if block.nin_shortcut is not None:
            put(f"{target}.conv_shortcut", block.nin_shortcut)

    def attention(target, block):
        for name, own in {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}.items():
            put(f"{target}.{name}", getattr(block, own))

    put("time_embedding.linear_1", ours.temb.dense[0])
    put("time_embedding.linear_2", ours.temb.dense[1])
    put("conv_in", ours.conv_in)
    res("down_blocks.0.resnets.0", ours.down[0].block[0])
    put("down_blocks.0.downsamplers.0.conv", ours.down[0].downsample.conv)
    res("down_blocks.1.resnets.0", ours.down[1].block[0])
    attention("down_blocks.1.attentions.0", ours.down[1].attn[0])
    res("mid_block.resnets.0", ours.mid.block_1)
    attention("mid_block.attentions.0", ours.mid.attn_1)
    res("mid_block.resnets.1", ours.mid.block_2)
    for i in range(2):
        res(f"up_blocks.0.resnets.{i}", ours.up[1].block[i])
        attention(f"up_blocks.0.attentions.{i}", ours.up[1].attn[i])
        res(f"up_blocks.1.resnets.{i}", ours.up[0].block[i])
    put("up_blocks.0.upsamplers.0.conv", ours.up[1].upsample.conv)
    put("conv_norm_out", ours.norm_out)
    put("conv_out", ours.conv_out)
    return state


class TestEDM:
    def test_parameters(self):
        """55.7 M as published, the map of augmentation labels among them."""
        assert counted("cifar10-edm") == (55_733_891, 417)

    def test_names(self):
        shapes = {name: tuple(value.shape) for name, value in skeleton("score", "cifar10-edm").state_dict().items()}
        for name, shape in {
            "map_augment.weight": (128, 9),
            "map_layer0.weight": (512, 128),
            "enc.32x32_conv.weight": (128, 3, 3, 3),
            "enc.32x32_block0.skip.weight": (256, 128, 1, 1),
            "enc.16x16_down.affine.bias": (256,),
            "enc.16x16_block3.qkv.weight": (768, 256, 1, 1),
            "dec.8x8_in0.proj.weight": (256, 256, 1, 1),
            "dec.16x16_up.skip.weight": (256, 256, 1, 1),
            "dec.16x16_block4.norm2.weight": (256,),
            "dec.32x32_block4.conv0.weight": (256, 384, 3, 3),
            "dec.32x32_aux_norm.weight": (256,),
            "dec.32x32_aux_conv.weight": (3, 256, 3, 3),
        }.items():
            assert shapes.pop(name) == shape
        attending = {name.rpartition(".qkv")[0] for name in shapes if ".qkv." in name}
        assert attending == {*(f"enc.16x16_block{i}" for i in range(4)), "dec.8x8_in0", "dec.16x16_block4"}

    def test_it_is_ddpmpp_in_another_layout(self):
        """With the same weights it is the network of Score SDE, told c_noise where that one is told 999 t."""
        edm = small("SongUNet")
        other = DDPMpp(nf=16, ch_mult=(2, 2), num_res_blocks=1, attn_resolutions=(4,), image_size=8).eval().double()
        layers = iter(other.all_modules)
        moved = [(next(layers), edm.map_layer0), (next(layers), edm.map_layer1)]
        for layer in [*edm.enc.values(), *edm.dec.values()]:
            target = next(layers)
            if not hasattr(layer, "conv0"):
                moved.append((target, layer))
                continue
            names = {"GroupNorm_0": "norm0", "Conv_0": "conv0", "Dense_0": "affine", "GroupNorm_1": "norm1", "Conv_1": "conv1"}
            moved += [(getattr(target, name), getattr(layer, own)) for name, own in names.items()]
            if layer.skip is not None:
                moved.append((target.Conv_2, layer.skip))
            if layer.attention:
                target = next(layers)
                moved.append((target.GroupNorm_0, layer.norm2))
                for i, nin in enumerate((target.NIN_0, target.NIN_1, target.NIN_2)):
                    nin.W.data.copy_(layer.qkv.weight[i::3, :, 0, 0].T)
                    nin.b.data.copy_(layer.qkv.bias[i::3])
                target.NIN_3.W.data.copy_(layer.proj.weight[:, :, 0, 0].T)
                target.NIN_3.b.data.copy_(layer.proj.bias)
        for target, source in moved:
            target.load_state_dict(source.state_dict())
        x, c_noise = states(), torch.tensor([-0.4, 0.2], dtype=torch.float64)
        with torch.no_grad():
            torch.testing.assert_close(edm.predict(x, c_noise), other(x, c_noise), rtol=1e-10, atol=1e-10)

    def test_it_is_preconditioned(self):
        network, x, labels = small("SongUNet"), states(), torch.tensor([20.0, 200.0], dtype=torch.float64)
        expected = edm_eps_hat(network.predict, x, labels, sde=coupfast.VPSDE())
        torch.testing.assert_close(network(x, labels), expected, rtol=0, atol=0)

    def test_checkpoints_of_the_public_code(self, tmp_path, monkeypatch):
        """`net.state_dict()` has the prefix of the preconditioning, and the filters of the resampling layers as buffers."""
        network = small("SongUNet", torch.float32)
        monkeypatch.setitem(registry.family_of("SongUNet").names, "small", SMALL["SongUNet"])
        state = {f"model.{name}": value for name, value in network.state_dict().items()}
        for place in ("enc.4x4_down", "dec.8x8_up"):
            for layer in ("conv0", "skip"):
                state[f"model.{place}.{layer}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
        torch.save(state, tmp_path / "edm.pt")
        loaded = load_score(tmp_path / "edm.pt")
        x, labels = states(dtype=torch.float32), torch.tensor([30.0, 60.0])
        torch.testing.assert_close(loaded(x, labels), network(x, labels), rtol=0, atol=0)
        torch.save({name: value for name, value in state.items() if "map_augment" not in name}, tmp_path / "plain.pt")
        assert load_score(tmp_path / "plain.pt").config["augment_dim"] == 0
        wide = {name: torch.zeros(1, 1, 4, 4) if name.endswith("_filter") else value for name, value in state.items()}
        torch.save(wide, tmp_path / "wide.pt")
        with pytest.raises(CheckpointError, match="wider filter"):
            load_score(tmp_path / "wide.pt")
        torch.save({**state, "model.map_label.weight": torch.zeros(16, 10)}, tmp_path / "labels.pt")
        with pytest.raises(CheckpointError, match="conditioned on class labels"):
            load_score(tmp_path / "labels.pt")


def guided_forward(state, x, steps, *, width, heads_of):
    """guided-diffusion's network from its weights alone, as its facts are written; blocks by the names that there are."""

    def layer(name, h):
        weight, bias = state[f"{name}.weight"], state[f"{name}.bias"]
        if weight.ndim == 1:
            return F.group_norm(h, 32, weight, bias, eps=1e-5)
        if weight.ndim == 2:
            return h @ weight.T + bias
        if weight.ndim == 3:
            return torch.einsum("oc,bcn->bon", weight[:, :, 0], h) + bias[:, None]
        return F.conv2d(h, weight, bias, padding=weight.shape[-1] // 2)

    def res(name, h, way):
        def resampled(a):
            if way == "down":
                return F.avg_pool2d(a, 2)
            return a.repeat_interleave(2, 2).repeat_interleave(2, 3) if way == "up" else a

        inner = layer(f"{name}.in_layers.2", resampled(F.silu(layer(f"{name}.in_layers.0", h))))
        both = layer(f"{name}.emb_layers.1", F.silu(emb))
        s, b = both[:, : inner.shape[1], None, None], both[:, inner.shape[1] :, None, None]
        inner = layer(f"{name}.out_layers.3", F.silu(layer(f"{name}.out_layers.0", inner) * (1 + s) + b))
        skip = resampled(h)
        return inner + (layer(f"{name}.skip_connection", skip) if f"{name}.skip_connection.weight" in state else skip)

    def attention(name, h):
        b, c, height, w = h.shape
        qkv = layer(f"{name}.qkv", layer(f"{name}.norm", h.reshape(b, c, -1)))
        outputs, size = [], c // heads_of(c)
        for head in range(heads_of(c)):
            q, k, v = (qkv[:, (3 * head + i) * size : (3 * head + i + 1) * size] for i in range(3))
            weights = torch.einsum("bct,bcs->bts", q / size**0.25, k / size**0.25).softmax(dim=-1)
            outputs.append(torch.einsum("bts,bcs->bct", weights, v))
        return h + layer(f"{name}.proj_out", torch.cat(outputs, dim=1)).reshape(h.shape)

    def block(name, h, way):
        if f"{name}.0.weight" in state:
            return layer(f"{name}.0", h)
        i = 0
        while any(key.startswith(f"{name}.{i}.") for key in state):
            part = f"{name}.{i}"
            here = f"{part}.in_layers.0.weight" in state
            h = res(part, h, way if way == "down" or i > 0 else "") if here else attention(part, h)
            i += 1
        return h

    half = width // 2
    angles = steps.double()[:, None] * torch.exp(-math.log(1e4) * torch.arange(half).double() / half)
    emb = layer("time_embed.2", F.silu(layer("time_embed.0", torch.cat([angles.cos(), angles.sin()], dim=1))))
    stored = []
    for i, way in enumerate(["", "", "down", ""]):
        x = block(f"input_blocks.{i}", x, way)
        stored.append(x)
    x = res("middle_block.2", attention("middle_block.1", res("middle_block.0", x, "")), "")
    for i in range(4):
        x = block(f"output_blocks.{i}", torch.cat([x, stored.pop()], dim=1), "up")
    return layer("out.2", F.silu(layer("out.0", x)))


class TestGuided:
    def test_parameters(self):
        assert counted("imagenet256-uncond") == (552_814_086, 566)

    def test_names(self):
        shapes = {name: tuple(value.shape) for name, value in skeleton("score", "imagenet256-uncond").state_dict().items()}
        assert len(shapes) == 566
        for name, shape in {
            "time_embed.0.weight": (1024, 256),
            "input_blocks.0.0.weight": (256, 3, 3, 3),
            "input_blocks.3.0.emb_layers.1.weight": (512, 1024),
            "input_blocks.13.1.qkv.weight": (3072, 1024, 1),
            "middle_block.1.proj_out.weight": (1024, 1024, 1),
            "output_blocks.0.0.in_layers.2.weight": (1024, 2048, 3, 3),
            "output_blocks.0.0.skip_connection.weight": (1024, 2048, 1, 1),
            "output_blocks.2.2.out_layers.3.weight": (1024, 1024, 3, 3),
            "out.2.weight": (6, 256, 3, 3),
        }.items():
            assert shapes[name] == shape
        attending = sorted({name.rpartition(".qkv")[0] for name in shapes if ".qkv." in name})
        inputs = [f"input_blocks.{i}.1" for i in (10, 11, 13, 14, 16, 17)]
        assert attending == sorted([*inputs, "middle_block.1", *(f"output_blocks.{i}.1" for i in range(9))])

    def test_it_is_what_its_facts_say(self):
        network, x, steps = small("GuidedUNet"), states(), torch.tensor([150, 3])
        with torch.no_grad():
            expected = guided_forward(network.state_dict(), x, steps, width=32, heads_of=lambda c: c // 16)
            # Features of a time are sines and cosines in float32.
            torch.testing.assert_close(network.predict(x, steps), expected, rtol=1e-4, atol=1e-5)

    def test_it_is_told_the_step_below(self):
        network, x = small("GuidedUNet"), states()
        labels = 999 * torch.tensor([0.15, 0.0299], dtype=torch.float64)
        expected = network.predict(x, torch.tensor([150, 29]))
        assert expected.shape == (2, 6, 8, 8)
        torch.testing.assert_close(network(x, labels), expected[:, :3], rtol=0, atol=0)

    def test_class_labels_are_refused(self):
        state = {**skeleton("score", "imagenet256-uncond").state_dict(), "label_emb.weight": torch.zeros(1000, 1024)}
        with pytest.raises(CheckpointError, match="conditioned on class labels"):
            registry.recognised(state)


class TestEach:
    def test_it_depends_on_image_and_time(self, network):
        x, labels = states(), torch.tensor([20.0, 20.0], dtype=torch.float64)
        found = network(x, labels)
        assert found.shape == x.shape and found.dtype == x.dtype
        assert 0.05 < float(found.std()) < 20
        torch.testing.assert_close(network(x, labels[:1]), found, rtol=1e-10, atol=1e-12)
        assert not torch.allclose(network(x, 10 * labels), found, rtol=1e-3)
        one = network(x[:1], labels[:1])
        torch.testing.assert_close(one, found[:1], rtol=1e-10, atol=1e-10)

    def test_wrong_inputs(self, network):
        with pytest.raises(ValueError, match=r"`x` must have shape \(batch, 3, 8, 8\), got \(2, 3, 4, 4\)"):
            network(states()[:, :, :4, :4], torch.ones(2))
        with pytest.raises(ValueError, match="`labels` must have shape"):
            network(states(), torch.ones(3))

    def test_its_exact_gradient(self, network):
        images = torch.rand(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        for options in ({"method": "reverse-sde", "num_steps": 2}, {"method": "lm", "num_steps": 1}):
            purifier = coupfast.Purifier(network, engine="eager", **options)
            found = coupfast.check_gradient(purifier, images, images=2, draws=0, directions=0)
            assert found.verdict == "exact" and found.relative_error < 1e-10

    def test_a_checkpoint_of_the_same_names(self, network, tmp_path):
        """Its weights as PyTorch saves them, alone or behind what training code puts around them, and as safetensors."""
        config = network.config
        state = {name: value.float() for name, value in network.state_dict().items()}
        for content in (state, {"model": {f"module.{name}": value for name, value in state.items()}, "step": 3}):
            torch.save(content, tmp_path / "weights.pt")
            with pytest.raises(CheckpointError, match="unknown architecture"):  # of this size nothing is known
                load_score(tmp_path / "weights.pt")
            loaded = coupfast.models.from_file.score_from_file(tmp_path / "weights.pt", config=config)
            x, labels = states(dtype=torch.float32), torch.tensor([30.0, 60.0])
            with torch.no_grad():
                torch.testing.assert_close(loaded.eval()(x, labels), network.float()(x, labels), rtol=0, atol=0)
        coupfast.models.from_file.convert_checkpoint(tmp_path / "weights.pt", tmp_path / "w.safetensors", config=config)
        assert load_score(tmp_path / "w.safetensors").config == config

    def test_a_checkpoint_of_a_named_size_is_recognised(self, network):
        """By names and shapes, without its configuration; not if a tensor is of another shape."""
        arch = network.config["arch"]
        for name, config in registry.family_of(arch).names.items():
            state = skeleton("score", name).state_dict()
            family, found = registry.recognised(state)
            assert family.arch == arch and dict(found) == dict(config)
            state[next(iter(state))] = torch.empty(7, device="meta")
            assert registry.recognised(state) is None

    def test_it_is_refused_where_an_adapter_would_be_wrong(self, network):
        with pytest.raises(ValueError, match="knows what it predicts"):
            load_score(network, prediction="v_prediction")

    @pytest.mark.parametrize("engine", ["cpu", "eager"])
    def test_engines_agree(self, network, engine):
        score = network.float()
        x = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
        exact = coupfast.Purifier(score, method="reverse-sde", num_steps=2, engine="eager")(x, seed=1)
        found = coupfast.Purifier(score, method="reverse-sde", num_steps=2, engine=engine)(x, seed=1)
        torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-4)
        slopes = [torch.autograd.grad(out.square().sum(), x)[0] for out in (exact, found)]
        assert float((slopes[0] - slopes[1]).norm() / slopes[0].norm()) < 1e-3

    def test_it_is_a_flat_graph_for_the_cuda_engine(self, network):
        """What depends on the label alone is in tables; the rest computes what the network does, and hides no tensor."""
        score, labels = network.float(), torch.tensor([150.3, 20.0, 1.0])
        found = trace(score, lambda batch: (torch.zeros(batch, 3, 8, 8), labels[:1].expand(batch).clone()))
        traced, x = TracedScore(found, labels), states(dtype=torch.float32)
        graph = flatten(lambda x, step, *c: (traced(x, step, *c),), (x, torch.tensor(0)), traced.constants)
        if not formats_are_foreseen():
            pytest.skip("this PyTorch foresees another format of a CPU's maps than it makes: the graph is NOT run")
        for step, label in enumerate(labels):
            expected = score(x, label.expand(2))
            torch.testing.assert_close(graph(x, torch.tensor(step))[0], expected, rtol=1e-4, atol=1e-5)
        assert not any(word in str(node.target) for node in graph.operations() for word in ("sin", "cos", "round", "floor."))

    def test_sizes_that_cannot_be(self, network):
        arch = network.config["arch"]
        build = registry.family_of(arch).build
        word = "ch_mult" if arch == "DDPMUNet" else "channel_mult"
        with pytest.raises(ValueError, match="positive whole multiples"):
            build(**{**SMALL[arch], word: [0]})
        with pytest.raises(ValueError, match="image size that 2 divides, got 7"):
            build(**{**SMALL[arch], "image_size": 7})
