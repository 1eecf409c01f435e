#!/usr/bin/env python3
"""cmake --install, and what others build against the result: find_package, pkg-config, manual pages, completions, the Python wheel."""
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import unittest

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
BUILD = pathlib.Path(os.environ["KVPLAN_BUILD"])
PLAN = REPOSITORY / "tests/data/formats/v1/plan"
ROOT = pathlib.Path(tempfile.mkdtemp(prefix="kvplan-install-"))
PREFIX = ROOT / "prefix"


def run(*args, **more):
    return subprocess.run([*map(str, args)], capture_output=True, text=True, timeout=600, **more)


def setUpModule():
    done = run("cmake", "--install", BUILD, "--prefix", PREFIX)
    if done.returncode:
        raise RuntimeError(done.stderr)


def tearDownModule():
    shutil.rmtree(ROOT)


class Install(unittest.TestCase):
    def succeeds(self, *args, **more):
        done = run(*args, **more)
        self.assertEqual(done.returncode, 0, done.stdout + done.stderr)
        return done.stdout

    def cached(self, name):
        for line in (BUILD / "CMakeCache.txt").read_text().splitlines():
            if line.startswith(name + ":"):
                return line.partition("=")[2]
        return ""

    def test_consumer_finds_builds_and_runs(self):
        build = ROOT / "consumer"
        self.succeeds("cmake", "-S", REPOSITORY / "tests/consumer", "-B", build, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={PREFIX}",
                      "-DCMAKE_BUILD_TYPE=Release", f"-DCMAKE_CXX_COMPILER_LAUNCHER={self.cached('CMAKE_CXX_COMPILER_LAUNCHER')}")
        self.succeeds("cmake", "--build", build)
        self.assertIn("cost 0.25", self.succeeds(build / "consumer", PLAN))
        self.assertRegex(self.succeeds(build / "export_consumer", "kvtuner", PLAN), r"\.yaml: \d+ bytes")

    def test_nothing_installed_names_the_source_or_build_folder(self):
        for path in [*PREFIX.rglob("*.cmake"), *PREFIX.rglob("*.pc")]:
            for folder in (REPOSITORY, BUILD):
                self.assertNotIn(str(folder), path.read_text(), path)

    def test_manual_pages_and_completions(self):
        self.assertIn("kvplan\\-plan", (PREFIX / "share/man/man1/kvplan.1").read_text())
        page = (PREFIX / "share/man/man1/kvplan-profile.1").read_text()
        self.assertIn("\\-\\-tokens", page)
        for file in ("bash-completion/completions/kvplan", "zsh/site-functions/_kvplan", "fish/vendor_completions.d/kvplan.fish"):
            self.assertIn("validate", (PREFIX / "share" / file).read_text())

    def test_c_program_by_pkg_config(self):
        if self.cached("KVPLAN_CUDA") != "ON":
            self.skipTest("built without the CUDA runtime")
        env = {**os.environ, "PKG_CONFIG_PATH": str(next(PREFIX.rglob("pkgconfig")))}
        flags = self.succeeds("pkg-config", "--cflags", "--libs", "kvplan_runtime", env=env).split()
        program = ROOT / "runtime_consumer"
        self.succeeds("cc", "-Wall", "-Werror", "-o", program, REPOSITORY / "tests/consumer/runtime_consumer.c", *flags)
        library = next(PREFIX.rglob("libkvplan_runtime.so")).parent
        heads = json.loads((PLAN / "plan.json").read_text())["model"]["query_heads"]
        self.assertIn("bytes", self.succeeds(program, PLAN, heads, env={**os.environ, "LD_LIBRARY_PATH": str(library)}))

    def test_wheel_in_a_fresh_environment(self):
        wheels = ROOT / "wheels"
        self.succeeds(sys.executable, REPOSITORY / "scripts/wheel", "--build", BUILD, "--out", wheels)
        wheel, = wheels.glob("*.whl")
        venv = ROOT / "venv"
        self.succeeds(sys.executable, "-m", "venv", venv)
        # The torch of this test's environment stands in for the one that pip would fetch.
        self.succeeds(venv / "bin/python", "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel)
        packages, = (venv / "lib").glob("python*/site-packages")
        import torch
        (packages / "torch").symlink_to(pathlib.Path(torch.__file__).parent)
        for other in pathlib.Path(torch.__file__).parents[1].iterdir():
            if other.name in ("torch.libs", "nvidia"):
                (packages / other.name).symlink_to(other)
        self.assertRegex(self.succeeds(venv / "bin/kvplan", "--version"), r"^kvplan \d+\.\d+")
        self.assertIn("llama", self.succeeds(venv / "bin/kvplan", "inspect", PLAN))
        shown = self.succeeds(venv / "bin/python", "-c", "import kvplan; print(kvplan.__version__, kvplan.run('inspect', "
                              f"{str(PLAN)!r}, '--json')['format'])")
        self.assertIn("kvplan.plan", shown)


if __name__ == "__main__":
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=1).run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]))
    failed = len({getattr(test, "test_case", test).id() for test, _ in result.failures + result.errors})
    print(json.dumps({"passed": result.testsRun - failed - len(result.skipped), "failed": failed, "skipped": len(result.skipped)}))
    sys.exit(1 if failed else 0)
