#!/usr/bin/env python3
"""inspect, profile, plan and validate on a tiny checkpoint of each family of models."""
import json
import shutil
import sys

from cli_test_case import CliTest, MODEL, REPOSITORY, TEXT, main, setUpModule, tearDownModule

sys.path.insert(0, str(REPOSITORY / "tests"))

# Names of tests/make_fixtures.py, and what `inspect` says of them.
FAMILIES = {
    "mistral_window": "window 16 in 3 of 3 layers",
    "qwen2_window": "window 16 in 2 of 3 layers",
    "qwen3": "norm of each query and key",
    "gemma": "plain",
    "gemma2": "scores capped at 2.000, logits capped at 3.000",
    "gemma3": "layers with a window 10000",
    "phi2": "8, 10000",
    "phi3_longrope": "scaling longrope beyond 32 tokens",
    "gpt2": "learned positions",
}


class Families(CliTest):
    def make(self, model):
        """A fixture's configuration with the vocabulary and tokenizer of the tests."""
        import make_fixtures
        vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
        model.config = model.config | {"vocab_size": vocabulary}
        folder = self.folder / model.name
        make_fixtures.build(model).save_pretrained(folder)
        shutil.copyfile(MODEL / "tokenizer.json", folder / "tokenizer.json")
        return folder

    def test_from_checkpoint_to_validation(self):
        import make_fixtures
        for model in make_fixtures.MODELS:
            if model.name not in FAMILIES:
                continue
            with self.subTest(model.name):
                folder = self.make(model)
                text = ("--text", TEXT, "--window", 72)
                profile, plan = self.folder / f"profile_{model.name}", self.folder / f"plan_{model.name}"
                self.assertIn(FAMILIES[model.name], self.succeeds("inspect", folder).stdout)
                self.succeeds("profile", "--model", folder, *text, "--tokens", 576, "--part", "0:0.5", "--out", profile)
                self.succeeds("plan", "--profile", profile, "--bits", 4, "--group-size", 8, "--context", 256, "--out", plan)
                done = self.succeeds("validate", "--model", folder, *text, "--windows", 1, "--part", "0.5:1", "--plan", plan,
                                     "--baselines", "none", "--mode", "worst,decode", "--json")
                kl = [c["kl"]["mean"] for c in json.loads(done.stdout)["candidates"] if c["name"] == "plan"]
                self.assertEqual(len(kl), 2)
                self.assertTrue(all(0 < x < 1 for x in kl), kl)


if __name__ == "__main__":
    main()
