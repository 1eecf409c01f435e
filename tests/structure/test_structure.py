#!/usr/bin/env python3
"""The table of docs/architecture.md against the sources: what folders include, their targets and namespaces, where LibTorch is, links of the docs."""
import json
import pathlib
import re
import sys
import unittest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = {".h", ".cpp", ".cu", ".cuh"}


def sources(folder):
    return [p for p in sorted((ROOT / folder).rglob("*")) if p.suffix in SOURCES]


def table():
    """{folder: (folders that it may include, whether it may include LibTorch)}, in the order of the table."""
    rows = {}
    for line in (ROOT / "docs/architecture.md").read_text().splitlines():
        if row := re.fullmatch(r"\| `(\w+)` \|.*\| (.+) \| (yes|–) \|", line):
            folder, allowed, torch = row.groups()
            rows[folder] = (list(rows) if allowed == "all" else [] if allowed == "–" else allowed.split(", "), torch == "yes")
    return rows


class StructureTest(unittest.TestCase):
    def test_every_folder_of_the_build_is_in_the_table(self):
        built = set(re.findall(r"add_subdirectory\((\w+)\)", (ROOT / "CMakeLists.txt").read_text()))
        self.assertEqual(set(table()), built - {"tests", "bench", "data"})

    def test_arrows_point_up_the_table(self):
        above = []
        for folder, (allowed, _) in table().items():
            self.assertLessEqual(set(allowed), set(above), f"{folder} includes a folder that stands below it")
            above.append(folder)

    def test_folders_include_what_the_table_allows(self):
        rows = table()
        for folder, (allowed, torch) in rows.items():
            for path in sources(folder):
                text = path.read_text()
                found = set(re.findall(r'^#include "(\w+)/', text, re.M)) & set(rows) - {folder}
                self.assertLessEqual(found, set(allowed), path)
                if not torch:
                    self.assertIsNone(re.search(r"^#include <(torch|ATen|c10)/", text, re.M), f"{path} includes LibTorch")

    def test_a_folder_is_a_target_and_a_namespace(self):
        for folder in table():
            cmake = (ROOT / folder / "CMakeLists.txt").read_text()
            self.assertTrue(f"kvplan_library({folder}\n" in cmake or folder == "cli", f"{folder} is no target of that name")
            namespace = "kvplan" if folder == "schemas" else f"kvplan::{folder}"
            for path in sources(folder):
                for found in re.findall(r"^namespace (kvplan[\w:]*)", path.read_text(), re.M):
                    self.assertTrue(found == namespace or found.startswith(namespace + "::"), f"{path}: namespace {found}")

    def test_links_and_paths_in_the_docs_exist(self):
        folders = "|".join([*table(), "tests", "scripts", "docs", "bench", "data", "python"])
        for page in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
            text = page.read_text()
            for link in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text):
                self.assertTrue((page.parent / link).exists(), f"{page}: link to {link}")
            for path in re.findall(rf"`((?:{folders})/[\w./-]+\.(?:h|cpp|cu|cuh|py|json|md))`", text):
                self.assertTrue((ROOT / path).exists(), f"{page}: {path}")


if __name__ == "__main__":
    result = unittest.TextTestRunner(stream=sys.stderr, verbosity=1).run(unittest.defaultTestLoader.loadTestsFromModule(sys.modules["__main__"]))
    failed = len(result.failures) + len(result.errors)
    print(json.dumps({"passed": result.testsRun - failed, "failed": failed, "skipped": 0}))
    sys.exit(1 if failed else 0)
