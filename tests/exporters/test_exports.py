"""Exports of the kvplan program, read by the libraries that they are for: transformers caches, the gguf and safetensors readers,
compressed-tensors, a YAML parser. Run like tests/cli (KVPLAN_BUILD).
"""
import importlib.util
import json
import os
import pathlib
import shlex
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "cli"))
import cli_test_case as cli  # noqa: E402
from cli_test_case import ROOT, PROFILE, run, setUpModule, tearDownModule  # noqa: E402,F401


def plan(name, *args):
    """A plan of the random model of 2 layers (head_dim 16), made once."""
    folder = ROOT / name
    if not folder.exists():
        done = run("plan", "--profile", PROFILE, "--out", folder, *args)
        assert done.returncode == 0, done.stderr
    return folder


def edited(source, name, change):
    """A plan with another plan.json."""
    folder = ROOT / name
    folder.mkdir()
    document = json.loads((source / "plan.json").read_text())
    change(document)
    (folder / "plan.json").write_text(json.dumps(document))
    (folder / "plan.safetensors").write_bytes((source / "plan.safetensors").read_bytes())
    return folder


def export(target, source, name, *args, expect=0):
    out = ROOT / name
    done = run("export", target, "--plan", source, "--out", out, *args)
    assert done.returncode == expect, (done.returncode, done.stderr, done.stdout)
    return out, done


def load(name, path):
    """A Python file as a module."""
    specification = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def set_widths(layers):
    def change(document):
        for layer, widths in zip(document["layers"], layers):
            for side, width in zip("kv", widths):
                layer[side]["bits"] = width
                for head in layer[side]["heads"]:
                    head["widths"] = [width] * len(head["widths"])
    return change


class Command(unittest.TestCase):
    def test_exit_codes_and_files(self):
        source = plan("int4", "--policy", "int:4")
        out, done = export("kvtuner", source, "tuner", "--json")
        report = json.loads(done.stdout)
        self.assertEqual(report, json.loads((out / "loss-report.json").read_text()))
        manifest = json.loads((out / "manifest.json").read_text())
        self.assertEqual(sorted(manifest["files"]), ["kvplan_kivi.yaml"])
        self.assertIn("kvplan export kvtuner --plan", manifest["command"])
        self.assertIn("CODEC", [item["code"] for item in report["items"]])
        # --strict: the report, no files
        strict, done = export("kvtuner", source, "strict", "--strict", expect=6)
        self.assertIn("CODEC", done.stdout)
        self.assertFalse(strict.exists())
        # nothing is overwritten without --force
        export("kvtuner", source, "tuner", expect=7)
        export("kvtuner", source, "tuner", "--force")
        # a head of 16 channels is nothing that llama.cpp quantises
        _, done = export("llamacpp", source, "llama", expect=3)
        self.assertIn("/layers/0/head_dim", done.stderr)
        export("ollama", source, "none", expect=2)
        export("vllm", source, "none", "--tp", 2, expect=2)
        blocked = ROOT / "blocked"
        blocked.write_text("")
        export("kvtuner", source, "blocked/inside", expect=7)

    def test_strict_passes_what_loses_nothing(self):
        preset = ROOT / "M_kivi_KVTuner4_0.yaml"
        preset.write_text("0: {nbits_key: 8, nbits_value: 4}\n1: {nbits_key: 4, nbits_value: 2}\n")
        done = run("import", "kvtuner", preset, "--model-config", cli.MODEL, "--out", ROOT / "imported")
        self.assertEqual(done.returncode, 0, done.stderr)
        out, _ = export("kvtuner", ROOT / "imported", "again", "--strict")
        import yaml
        self.assertEqual(yaml.safe_load((out / "kvplan_kivi.yaml").read_text()), yaml.safe_load(preset.read_text()))

    def test_imports_are_validated_like_other_plans(self):
        preset = ROOT / "M_pertoken_KVTuner6_0.yaml"
        preset.write_text("0:\n  nbits_key: 8\n  nbits_value: 4\n1:\n  nbits_key: 4\n  nbits_value: 2\n")
        quantization = {"kv_cache_quant_algo": "MIXED_PRECISION", "kv_cache_schema_version": 1,
                        "kv_cache_quantized_layers": {"model.layers.1.self_attn": {"quant_algo": "FP8"}}}
        config = ROOT / "hf_quant_config.json"
        config.write_text(json.dumps({"producer": {}, "quantization": quantization}))
        for kind, file in (("kvtuner", preset), ("modelopt", config)):
            out = ROOT / f"from_{kind}"
            done = run("import", kind, file, "--model-config", cli.MODEL / "config.json", "--out", out)
            self.assertEqual(done.returncode, 0, done.stderr)
            document = json.loads((out / "plan.json").read_text())
            self.assertEqual(document["policy"], f"import:{kind}")
            self.assertIsNone(document["predicted_kl"])
            self.assertIsNone(document["model"]["kv_weights_sha256"])
            done = run("validate", "--plan", out, "--model", cli.MODEL, "--text", cli.TEXT, "--part", "0.5:1", "--window", 64,
                       "--windows", 2, "--baselines", "none", "--allow-other-weights", "--json")
            self.assertEqual(done.returncode, 0, done.stderr)
            found = json.loads(done.stdout)["candidates"]
            self.assertGreater(max(c["kl"]["mean"] for c in found), 0)
        self.assertEqual(run("import", "kvtuner", config, "--model-config", cli.MODEL, "--out", ROOT / "no").returncode, 3)


class Transformers(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM
        torch.manual_seed(0)
        cls.torch = torch
        cls.model = LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
                                                 num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
                                                 max_position_embeddings=512)).eval()
        cls.tokens = torch.randint(0, 64, (1, 320), generator=torch.Generator().manual_seed(1))

    def builder(self, widths):
        name = "hf_" + "_".join(f"{k}x{v}" for k, v in widths)
        source = edited(plan("int4", "--policy", "int:4"), name + "_plan", set_widths(widths))
        out, _ = export("hf", source, name)
        return load(name, out / "kv_plan_cache.py")

    def logits(self, cache, chunk):
        with self.torch.no_grad():
            return self.torch.cat([self.model(self.tokens[:, i:i + chunk], past_key_values=cache).logits
                                   for i in range(0, self.tokens.shape[1], chunk)], 1)

    def error(self, widths, chunk):
        from transformers.cache_utils import DynamicCache
        exact = self.logits(DynamicCache(), chunk)
        return (self.logits(self.builder(widths).build(), chunk) - exact).abs().mean().item()

    def test_16_bits_are_the_dynamic_cache(self):
        self.assertEqual(self.error([(16, 16), (16, 16)], 32), 0)

    def test_one_shot_shows_no_loss(self):
        self.assertEqual(self.error([(2, 2), (2, 1)], 320), 0)

    def test_error_grows_as_bits_fall(self):
        errors = [self.error([(b, b), (b, b)], 32) for b in (8, 4, 3, 1)]
        self.assertGreater(errors[0], 0)
        self.assertEqual(errors, sorted(errors))
        self.assertGreater(self.error([(16, 2), (16, 16)], 32), 0)


class Checkpoints(unittest.TestCase):
    def overlay(self, target, source, name, *args):
        out, _ = export(target, source, name, "--model", cli.MODEL, *args)
        from safetensors import safe_open
        tensors = {}
        with safe_open(out / "model-kv-scales.safetensors", "np") as file:
            for key in file.keys():
                tensors[key] = file.get_tensor(key)
        return out, tensors

    def test_scales_are_what_safetensors_reads_and_the_index_is_complete(self):
        from safetensors import safe_open
        source = plan("fp8", "--policy", "fp8_e4m3")
        out, tensors = self.overlay("kv-scales", source, "scales")
        with safe_open(source / "plan.safetensors", "np") as file:
            for layer in range(2):
                for side in "kv":
                    scale = tensors[f"model.layers.{layer}.self_attn.{side}_scale"]
                    self.assertEqual(scale.shape, (1,))
                    self.assertAlmostEqual(float(scale[0]) * 448, float(file.get_tensor(f"layers.{layer}.{side}.absmax").max()),
                                           places=5)
        index = json.loads((out / "model.safetensors.index.json").read_text())
        with safe_open(cli.MODEL / "model.safetensors", "np") as file:
            original = set(file.keys())
        self.assertEqual(set(index["weight_map"]), original | set(tensors))
        per_head = self.overlay("kv-scales", source, "scales_heads", "--per-head")[1]
        self.assertEqual(per_head["model.layers.1.self_attn.v_scale"].shape, (2, 1, 1))

    def test_compressed_tensors_takes_the_configuration(self):
        try:
            from compressed_tensors.quantization import QuantizationConfig
        except ImportError:
            self.skipTest("compressed-tensors is not installed")
        source = plan("fp8", "--policy", "fp8_e4m3")
        for name, args in (("ct", []), ("ct_heads", ["--per-head"])):
            out, _ = self.overlay("kv-scales", source, name, *args)
            block = json.loads((out / "config.json").read_text())["quantization_config"]
            block.pop("quant_method")
            config = QuantizationConfig.model_validate(block)
            self.assertEqual(config.kv_cache_scheme.num_bits, 8)
            self.assertEqual(config.kv_cache_scheme.strategy, "attn_head" if args else "tensor")

    def test_sglang_and_modelopt_overlays(self):
        source = plan("fp8", "--policy", "fp8_e4m3")
        out, tensors = self.overlay("sglang", source, "sglang", "--tp", 2)
        scales = json.loads((out / "sglang_kv_scales.json").read_text())["kv_cache"]["scaling_factor"]
        largest = max(float(tensors[f"model.layers.1.self_attn.{side}_scale"][0]) for side in "kv")
        self.assertAlmostEqual(scales["1"]["1"], largest, places=6)
        out, tensors = self.overlay("modelopt", source, "modelopt")
        self.assertIn("model.layers.0.self_attn.k_proj.k_scale", tensors)
        back = run("import", "modelopt", out / "config.json", "--model-config", cli.MODEL, "--out", ROOT / "back")
        self.assertEqual(back.returncode, 0, back.stderr)
        self.assertEqual(json.loads((ROOT / "back/plan.json").read_text())["codec"], "fp8_e4m3")


@unittest.skipUnless(os.environ.get("KVPLAN_DEMO_MODEL"), "KVPLAN_DEMO_MODEL does not name the demo model")
class LlamaCpp(unittest.TestCase):
    """Heads of 64, which the random model lacks: a short profile of the demo model."""
    @classmethod
    def setUpClass(cls):
        cls.profile = ROOT / "demo_profile"
        done = run("profile", "--model", os.environ["KVPLAN_DEMO_MODEL"], "--text", cli.TEXT, "--window", 64, "--tokens", 64,
                   "--out", cls.profile)
        assert done.returncode == 0, done.stderr
        cls.plan = ROOT / "demo_plan"
        done = run("plan", "--profile", cls.profile, "--bits", 4.5, "--out", cls.plan)
        assert done.returncode == 0, done.stderr

    def test_types_have_the_sizes_of_ggml(self):
        import gguf
        out, done = export("llamacpp", self.plan, "demo_main", "--json")
        words = shlex.split((out / "llama.args").read_text())
        bits = 0
        for flag in ("-ctk", "-ctv"):
            elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[words[words.index(flag) + 1].upper()]]
            bits += 8 * size / elements / 2
        self.assertAlmostEqual(json.loads(done.stdout)["export_bits"], bits)

    def test_gguf_reads_the_centres(self):
        import gguf
        import numpy
        from safetensors import safe_open
        source = edited(self.plan, "demo_k4", set_widths([(4, 4)] * 30))
        out, _ = export("llamacpp", source, "demo_centre", "--mean-centre", "centre.gguf")
        reader = gguf.GGUFReader(out / "centre.gguf")
        self.assertEqual(reader.fields["general.type"].contents(), "kv-mean-center")
        # Keys go through the server's Hadamard matrix of 64, and so do their means.
        self.assertIs(bool(reader.fields["kv_mean_center.k_rot"].contents()), True)
        hadamard = numpy.ones((1, 1))
        while len(hadamard) < 64:
            hadamard = numpy.block([[hadamard, hadamard], [hadamard, -hadamard]])
        self.assertEqual([t.name for t in reader.tensors], [f"kv_bar.blk.{l}.k" for l in sorted(range(30))])
        with safe_open(source / "plan.safetensors", "np") as file:
            for tensor in reader.tensors:
                mean = file.get_tensor(f"layers.{tensor.name.split('.')[2]}.k.mean_rotated")
                turned = mean.reshape(-1, 64).astype("f8") @ hadamard / 8
                numpy.testing.assert_allclose(tensor.data, turned.reshape(-1), rtol=1e-5, atol=1e-5)


class TurboQuantOfVllm(unittest.TestCase):
    """Against config.py of an unpacked vLLM wheel, where KVPLAN_VLLM names it; the same sizes as in choose_test.cpp."""
    SLOTS = {"turboquant_k8v4": (100, 196, 388), "turboquant_4bit_nc": (70, 134, 262), "turboquant_k3v4_nc": (62, 118, 230),
             "turboquant_3bit_nc": (54, 102, 198)}

    def test_slots(self):
        root = os.environ.get("KVPLAN_VLLM")
        if not root:
            self.skipTest("KVPLAN_VLLM does not name an unpacked vllm wheel")
        path = pathlib.Path(root) / "model_executor/layers/quantization/turboquant/config.py"
        config = load("turboquant_config", path)
        self.assertEqual(set(config.TQ_PRESETS), set(self.SLOTS))
        for name, sizes in self.SLOTS.items():
            for head_dim, size in zip((64, 128, 256), sizes):
                self.assertEqual(config.TurboQuantConfig.from_cache_dtype(name, head_dim).slot_size_aligned, size)


if __name__ == "__main__":
    cli.main()
