"""What the end-to-end tests of the kvplan program share: a tiny random model with a profile, and how to run the program.

KVPLAN_BUILD names the build folder (scripts/run_tests.py sets it).
"""
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import unittest

KVPLAN = pathlib.Path(os.environ["KVPLAN_BUILD"]) / "cli" / "kvplan"
REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
ROOT = pathlib.Path(tempfile.mkdtemp(prefix="kvplan-cli-"))
MODEL, TEXT, PROFILE = ROOT / "model", ROOT / "text.md", ROOT / "profile"


def fixed_text(size):
    """Sentences of the words of LICENSE, the same bytes at any state of the repository: figures of the tests change with the code alone."""
    draws, words, text = random.Random(0), (REPOSITORY / "LICENSE").read_text().split(), ""
    while len(text) < size:
        # Runs of words as they stand there: something to predict.
        begin, count = draws.randrange(len(words)), draws.randrange(4, 24)
        text += " ".join(words[begin:begin + count]).capitalize() + draws.choice([". ", ".\n\n", ": ", "! "])
    return text


def make_model(folder, seed, hidden_size=64, heads=4):
    """A llama of 2 layers and half as many KV heads as heads, with a byte-level BPE tokenizer trained on TEXT."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, logging
    logging.disable_progress_bar()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train([str(TEXT)], trainers.BpeTrainer(vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                                     show_progress=False))
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=tokenizer.get_vocab_size(), hidden_size=hidden_size, intermediate_size=96, num_hidden_layers=2,
                         num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=256, tie_word_embeddings=True,
                         initializer_range=0.2, eos_token_id=None)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))


def run(*args, **more):
    done = subprocess.run([str(KVPLAN), *map(str, args)], capture_output=True, timeout=300, **more)
    # Decoded here: text mode would turn the carriage returns that a random model writes into line ends.
    done.stdout, done.stderr = done.stdout.decode(), done.stderr.decode()
    return done


def profile_args(out, *more, tokens=512):
    return ["profile", "--model", MODEL, "--text", TEXT, "--part", "0:0.5", "--window", 64, "--tokens", tokens, "--out", out, *more]


def setUpModule():
    TEXT.write_text(fixed_text(30000))
    make_model(MODEL, 0)
    done = run(*profile_args(PROFILE))
    if done.returncode:
        raise RuntimeError(done.stderr)


def tearDownModule():
    shutil.rmtree(ROOT)


class CliTest(unittest.TestCase):
    def setUp(self):
        self.folder = pathlib.Path(tempfile.mkdtemp(dir=ROOT))

    def succeeds(self, *args, **more):
        done = run(*args, **more)
        self.assertEqual(done.returncode, 0, done.stderr)
        return done

    def fails(self, code, text, *args, **more):
        done = run(*args, **more)
        self.assertEqual(done.returncode, code, done.stdout + done.stderr)
        self.assertIn(text, done.stderr)
        self.assertEqual(done.stdout, "", "results on stdout although the command failed")
        return done

    def plan(self, name, *more, bits=3.5):
        out = self.folder / name
        self.succeeds("plan", "--profile", PROFILE, "--bits", bits, "--context", 256, "--out", out, *more)
        return out

    def validate(self, plan, *more, windows=3):
        """Windows long enough for mode decode to fill pages."""
        return run("validate", "--model", MODEL, "--text", TEXT, "--part", "0.5:1", "--window", 200, "--windows", windows, "--plan", plan,
                   *more)


def main():
    """Runs the tests of the program's main module. Last line of stdout: {"passed": N, "failed": N, "skipped": N}."""
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=1).run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]))
    failed = len({getattr(test, 'test_case', test).id() for test, _ in result.failures + result.errors})
    print(json.dumps({"passed": result.testsRun - failed - len(result.skipped), "failed": failed, "skipped": len(result.skipped)}))
    sys.exit(1 if failed else 0)
