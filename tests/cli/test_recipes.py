#!/usr/bin/env python3
"""Runs docs/recipes.md from top to bottom, as a user would, on a tiny model; then the rest of what a user meets first."""
import json
import os
import pathlib
import pty
import re
import shutil
import subprocess

from cli_test_case import CliTest, KVPLAN, MODEL, PROFILE, REPOSITORY, TEXT, main, profile_args, run, setUpModule, tearDownModule  # noqa: F401


class Recipes(CliTest):
    def test_page_runs(self):
        blocks = re.findall(r"^```sh\n(.*?)^```", (REPOSITORY / "docs/recipes.md").read_text(), re.DOTALL | re.MULTILINE)
        self.assertGreater(len(blocks), 8)
        env = {**os.environ, "PATH": f"{KVPLAN.parent}:{os.environ['PATH']}", "MODEL": str(MODEL), "TEXT": str(TEXT)}
        for block in blocks:
            with self.subTest(block=block):
                done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=self.folder, env=env, capture_output=True, text=True,
                                      timeout=300)
                self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        self.assertTrue((self.folder / "report.html").exists())
        self.assertLessEqual(json.loads((self.folder / "plan-from-file/plan.json").read_text())["effective_bits"], 2.5)


class FirstSteps(CliTest):
    def test_doctor(self):
        self.assertIn("works  inspect, plan", self.succeeds("doctor").stdout)
        found = json.loads(self.succeeds("doctor", "--json").stdout)
        self.assertRegex(found["versions"]["kvplan"], r"^\d+\.\d+\.\d+$")
        self.assertRegex(found["versions"]["libtorch"], r"^2\.")
        self.assertGreater(found["machine"]["memory_bytes"], found["machine"]["memory_available_bytes"])
        for ability in found["abilities"]:
            self.assertEqual(ability["works"], ability["lacks"] == "", ability)

    def test_estimate_is_one_document(self):
        found = json.loads(self.succeeds(*profile_args(self.folder / "p"), "--dry-run", "--json").stdout)
        self.assertEqual(found["windows"], 8)
        self.assertGreater(found["estimated_seconds"], 0)
        self.assertGreater(found["estimated_memory_bytes"], 100e6)
        self.assertEqual(list(self.folder.iterdir()), [])

    def test_misspelt_words(self):
        for args, meant in ((["plam"], '"plan"'), (["plan", "--bist", 3], '"--bits"'), (["profile", "--modle=x"], '"--model"'),
                            (["--verison"], '"--version"')):
            with self.subTest(args=args):
                self.fails(2, f"did you mean {meant}?", *args)
        done = run("plan", "--profile", "x", "--out", "y", "--bits", 3, "--completely-different", 1)
        self.assertNotIn("did you mean", done.stderr)

    def test_config_file(self):
        config = self.folder / "kvplan.toml"
        config.write_text("[plan]\nbits = 2.5\ncontext = 256\n")
        self.succeeds("plan", "--config", config, "--profile", PROFILE, "--out", self.folder / "p")
        self.assertEqual(json.loads((self.folder / "p/plan.json").read_text())["budget"]["value"], 2.5)
        self.succeeds("plan", "--config", config, "--bits", 3, "--profile", PROFILE, "--out", self.folder / "q")
        self.assertEqual(json.loads((self.folder / "q/plan.json").read_text())["budget"]["value"], 3)
        config.write_text("[plan]\nbist = 2.5\n")
        self.fails(2, "--config", "plan", "--config", config, "--profile", PROFILE, "--out", self.folder / "r")

    def test_quiet_and_sparse_progress(self):
        self.assertEqual(self.succeeds(*profile_args(self.folder / "a"), "--quiet").stderr, "")
        stderr = self.succeeds(*profile_args(self.folder / "b", tokens=2048)).stderr
        self.assertIn("left", stderr)
        self.assertNotIn("\033", stderr)
        self.assertLess(len(stderr.splitlines()), 15)

    def test_colours_only_on_terminals_that_want_them(self):
        for settings, coloured in (({"TERM": "xterm"}, True), ({"TERM": "xterm", "NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)):
            env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "TERM")} | settings
            ours, theirs = pty.openpty()
            child = subprocess.Popen([str(KVPLAN), "inspect", "nothing"], stdout=theirs, stderr=theirs, env=env)
            os.close(theirs)
            text = os.read(ours, 4096).decode()
            child.wait()
            os.close(ours)
            with self.subTest(settings=settings):
                self.assertEqual("\033[31m" in text, coloured, repr(text))
        self.assertNotIn("\033", run("inspect", "nothing", env={**os.environ, "TERM": "xterm"}).stderr)


class Completion(CliTest):
    def shell(self, name, script):
        """Its output; a shell that is missing skips the test."""
        if shutil.which(name) is None:
            self.skipTest(f"{name} is not installed")
        done = subprocess.run([name, "-c", script], capture_output=True, text=True, cwd=self.folder)
        self.assertEqual(done.returncode, 0, done.stderr)
        self.assertEqual(done.stderr, "")
        return done.stdout.split()

    def script(self, shell):
        path = self.folder / f"completion.{shell}"
        path.write_text(self.succeeds("completion", shell).stdout)
        return path

    def test_bash(self):
        def completed(*words):
            array = " ".join(f"'{w}'" for w in words)
            return self.shell("bash", f"source {self.script('bash')}; COMP_WORDS=({array}); COMP_CWORD={len(words) - 1}; _kvplan; "
                              "printf '%s\\n' \"${COMPREPLY[@]}\"")
        self.assertEqual(completed("kvplan", "val"), ["validate"])
        self.assertEqual(completed("kvplan", "plan", "--bi"), ["--bits"])
        self.assertEqual(completed("kvplan", "plan", "--code", ""), ["scalar", "tcq"])
        self.assertIn("completion.bash", completed("kvplan", "inspect", "comp"))

    def test_zsh(self):
        self.assertEqual(self.shell("zsh", f"autoload -Uz compinit; compinit -u -d {self.folder}/dump; source {self.script('zsh')}; "
                                    "echo $_comps[kvplan]"), ["_kvplan"])

    def test_fish(self):
        script = self.script("fish")
        self.assertIn("validate", self.shell("fish", f"source {script}; complete -C 'kvplan val'"))
        self.assertIn("--bits", self.shell("fish", f"source {script}; complete -C 'kvplan plan --bi'"))
        self.assertIn("tcq", self.shell("fish", f"source {script}; complete -C 'kvplan plan --code '"))

    def test_manual_pages(self):
        self.succeeds("man", self.folder / "man1")
        names = {p.name for p in (self.folder / "man1").iterdir()}
        commands = re.findall(r"^  (\w+)", self.succeeds("--help").stdout.partition("Subcommands:")[2], re.MULTILINE)
        self.assertGreater(len(commands), 10)
        self.assertEqual(names, {"kvplan.1"} | {f"kvplan-{c}.1" for c in commands})
        self.assertIn("\\-\\-bits", (self.folder / "man1/kvplan-plan.1").read_text())
        if shutil.which("man") is None:
            self.skipTest("man is not installed")
        done = subprocess.run(["man", "--warnings", "-l", self.folder / "man1/kvplan-plan.1"], capture_output=True, text=True,
                              env={**os.environ, "MANWIDTH": "100", "LC_ALL": "C.UTF-8"})
        self.assertEqual((done.returncode, done.stderr), (0, ""))
        self.assertIn("--max-kl", done.stdout)


if __name__ == "__main__":
    main()
