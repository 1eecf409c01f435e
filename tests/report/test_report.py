#!/usr/bin/env python3
"""The report in a headless Chromium: errors, network, sorting, budget, maps, theme, keyboard, names and print.

Skipped without a Chromium: KVPLAN_CHROMIUM or a known name in PATH (Debian: apt-get install chromium).
"""
import base64
import json
import pathlib
import re
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1] / "cli"))
import cli_test_case
from cli_test_case import CliTest, MODEL, PROFILE, ROOT, TEXT, main, run
import devtools

MAX_BYTES = 3_000_000
MIN_CONTRAST = 4.5  # WCAG 2 AA, text
HOSTILE = "<img src=x onerror=alert(1)>"
BITS = (2.5, 3, 4)
PLANS = [ROOT / f"bits{b}" for b in BITS]
PAGE = ROOT / "report.html"
made_once = {}


def made(*args):
    done = run(*args)
    if done.returncode:
        raise RuntimeError(done.stderr)


def contrast(one, other):
    def luminance(colour):
        parts = [int(x) / 255 for x in re.findall(r"\d+", colour)[:3]]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts))
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def setUpModule():
    if not devtools.CHROMIUM:
        return
    cli_test_case.setUpModule()
    for bits, plan in zip(BITS, PLANS):
        made("plan", "--profile", PROFILE, "--bits", bits, "--context", 256, "--out", plan)
    made("validate", "--model", MODEL, "--text", TEXT, "--part", "0.5:1", "--window", 100, "--windows", 2, "--baselines", "q8_0,turboquant:2",
         "--plan", PLANS[1])
    made("report", "--profile", PROFILE, "--plan", *PLANS, "--out", PAGE)
    made_once["browser"] = devtools.Browser()


def tearDownModule():
    if "browser" in made_once:
        made_once["browser"].close()
    cli_test_case.tearDownModule()


@unittest.skipUnless(devtools.CHROMIUM, "no Chromium in PATH and none named by KVPLAN_CHROMIUM")
class Report(CliTest):
    """What the tests share; the page is that of three plans with a profile, the second of them measured."""

    @classmethod
    def setUpClass(cls):
        cls.plans, cls.page, cls.browser = PLANS, PAGE, made_once["browser"]
        cls.documents = [json.loads((plan / "plan.json").read_text()) for plan in PLANS]

    def tearDown(self):
        self.assertEqual(self.browser.problems, [])
        self.assertEqual([r for r in self.browser.requests if not r.startswith(("file:", "data:"))], [], "the report asked the network")

    def open(self, page=None):
        self.browser.open(page or self.page)

    def text(self, selector):
        return self.browser.evaluate(f"document.querySelector({json.dumps(selector)}).textContent")

    def texts(self, selector):
        return self.browser.evaluate(f"[...document.querySelectorAll({json.dumps(selector)})].map((n) => n.textContent)")

    def pick(self, selector, label):
        """Chooses the option with a text in a list, as a reader does."""
        self.browser.evaluate(f"""(() => {{
            const list = document.querySelector({json.dumps(selector)});
            list.value = [...list.options].find((o) => o.text === {json.dumps(label)}).value;
            list.dispatchEvent(new Event('change', {{bubbles: true}}));
        }})()""")

    def slide(self, index):
        self.browser.evaluate(f"""(() => {{
            const slider = document.getElementById('budget');
            slider.value = {index};
            slider.dispatchEvent(new Event('input', {{bubbles: true}}));
        }})()""")

    def map_of(self, document, side):
        """Mean widths, head by head, as the map writes them."""
        heads = range(document["model"]["kv_heads"])
        return [sum(w) / len(w) for h in heads for w in (layer[side]["heads"][h]["widths"] for layer in document["layers"])]

    def shown_map(self, side):
        return [float(x.replace("−", "-") or 0) for x in self.texts(f"#maps figure:nth-of-type({1 if side == 'k' else 2}) [data-head]")]

    def assertMap(self, document):
        for side in "kv":
            for shown, expected in zip(self.shown_map(side), self.map_of(document, side), strict=True):
                self.assertAlmostEqual(shown, expected, delta=0.0501)


class Opens(Report):
    def test_every_kind_of_report(self):
        hostile = self.folder / HOSTILE.replace("/", "")
        made("plan", "--profile", PROFILE, "--policy", "turboquant:3", "--context", 256, "--out", hostile)
        made("export", "kvtuner", "--plan", self.plans[1], "--out", self.folder / "kvtuner", "--allow-lower")
        imported = self.folder / "imported"
        made("import", "kvtuner", next((self.folder / "kvtuner").glob("*.yaml")), "--model", MODEL, "--out", imported)
        self.assertIsNone(json.loads((imported / "plan.json").read_text())["predicted_kl"])
        measured, plain = self.plans[1], self.plans[0]
        for name, inputs in {"all": ["--profile", PROFILE, "--plan", *self.plans, imported, hostile], "profile": ["--profile", PROFILE],
                             "plan": ["--plan", plain], "measured": ["--plan", measured], "imported": ["--plan", imported],
                             "imported first": ["--profile", PROFILE, "--plan", imported, measured],
                             "hostile name": ["--plan", hostile, "--profile", PROFILE]}.items():
            with self.subTest(name=name):
                page = self.folder / f"{name}.html"
                made("report", *inputs, "--out", page)
                self.assertLess(page.stat().st_size, MAX_BYTES)
                self.open(page)
                self.assertEqual(self.browser.problems, [])
                self.assertIn("Provenance", self.texts("h2"))
                self.assertEqual(self.browser.evaluate("document.images.length"), 0, "a name became markup")
                # every chart has drawn something, and gives its figures as a table
                self.assertTrue(self.browser.evaluate("""[...document.querySelectorAll('canvas')].every((c) =>
                    c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((x) => x !== 0))"""))
                self.browser.evaluate("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
                self.browser.evaluate("new Promise((done) => setTimeout(done))")
                self.assertEqual(self.browser.evaluate("[...document.querySelectorAll('details')].filter((d) => !d.querySelector('tbody tr')).length"), 0)

    def test_plans_of_the_same_name_stay_apart(self):
        twin = self.folder / "bits3"
        made("plan", "--profile", PROFILE, "--bits", 5, "--context", 256, "--out", twin)
        made("report", "--plan", self.plans[1], twin, "--out", self.folder / "twins.html")
        self.open(self.folder / "twins.html")
        self.assertEqual(self.texts("#plans tbody td:first-child"), ["bits3", "bits3 (2)"])

    def test_a_folder_is_named_however_it_is_given(self):
        for given in (".", "plan.json", f"{self.plans[0]}/", self.plans[0] / "plan.json"):
            done = run("report", "--plan", given, "--out", self.folder / "named.html", "--force", cwd=self.plans[0])
            self.assertEqual(done.returncode, 0, done.stderr)
            self.assertIn('"name":"bits2.5","plan":', (self.folder / "named.html").read_text())


class Explores(Report):
    def test_tables_sort_up_down_and_back(self):
        self.open()
        original = self.texts("#validation tbody td:first-child")
        column = self.texts("#validation th").index("p99") + 1
        values = lambda: [float(x) for x in self.texts(f"#validation tbody td:nth-child({column})")]
        before, button = values(), f"#validation th:nth-child({column}) button"
        for order, expected in (("ascending", sorted(before)), ("descending", sorted(before, reverse=True)), (None, before)):
            self.browser.point_at(button, click=True)
            self.assertEqual(values(), expected)
            self.assertEqual(self.browser.evaluate(f"document.querySelector({json.dumps(button)}).parentNode.getAttribute('aria-sort')"), order)
        self.assertNotEqual(before, sorted(before), "the order of the file was sorted by chance")
        self.assertEqual(self.texts("#validation tbody td:first-child"), original)
        # missing figures last in both directions: only one plan is measured
        column = self.texts("#plans th").index("measured KL ± s.e.") + 1
        for _ in range(2):
            self.browser.point_at(f"#plans th:nth-child({column}) button", click=True)
            self.assertEqual(self.texts("#plans tbody td:first-child")[0], "bits3")

    def stops(self):
        """Everything the slider stops at: (what it says, its bits, the index of the plan that it is or None)."""
        for index in range(int(self.browser.evaluate("document.getElementById('budget').max")) + 1):
            self.slide(index)
            said = self.text("#budget-text")
            yield said, float(re.search(r"([\d.]+) effective bits", said)[1]), next((i for i, p in enumerate(self.plans) if said.startswith(p.name + ":")), None)

    def test_the_slider_shows_the_map_of_every_point(self):
        self.open()
        seen, sizes, checked = set(), [], 0
        for said, bits, own in self.stops():
            sizes.append(bits)
            if own is not None:
                seen.add(own)
                self.assertIn("The map below is this plan's", said)
                self.assertMap(self.documents[own])
                continue
            self.assertIn("The map below is that of this point", said)
            if len(sizes) % 12 == 0:  # what the plan command makes of the point
                document = self.planned(re.search(r"kvplan plan --bits ([\d.]+)", said)[1])
                self.assertAlmostEqual(document["effective_bits"], bits, delta=6e-4)
                self.assertMap(document)
                self.assertIn(self.text("#map-of").split(" of ")[1].split(".")[0], f"front at {bits:.3f} bits")
                checked += 1
        self.assertEqual(seen, {0, 1, 2})
        self.assertEqual(sizes, sorted(sizes))
        self.assertGreater(checked, 2)
        self.assertGreater(len(sizes), 30)

    def planned(self, bits):
        out = self.folder / f"at-{bits}"
        made("plan", "--profile", PROFILE, "--bits", bits, "--context", 256, "--out", out)
        return json.loads((out / "plan.json").read_text())

    def test_constraints_are_found_again_or_nothing_is_shown(self):
        merged, narrow = self.folder / "merged", self.folder / "narrow"
        made("plan", "--profile", PROFILE, "--bits", 10, "--context", 256, "--merge", "layer", "--skip-layers", 0, "--out", merged)
        made("plan", "--profile", PROFILE, "--bits", 3, "--context", 256, "--widths", "2,3,4", "--out", narrow)
        for plan, known in ((merged, True), (narrow, False)):
            with self.subTest(plan=plan.name):
                page = self.folder / f"{plan.name}.html"
                made("report", "--profile", PROFILE, "--plan", plan, "--out", page)
                self.open(page)
                points = [said for said, *_ in self.stops() if not said.startswith(plan.name + ":")]
                self.assertGreater(len(points), 2)
                self.assertEqual(["The map below is that of this point" in said for said in points], [known] * len(points))
                self.assertEqual(["knows only these sums" in said for said in points], [not known] * len(points))

    def test_without_a_profile_the_slider_says_where_only_sums_are_known(self):
        page = self.folder / "plans.html"
        made("report", "--plan", *self.plans, "--out", page)
        self.open(page)
        seen = set()
        for said, bits, own in self.stops():
            if own is None:
                self.assertIn("knows only these sums", said)
                within = [i for i, d in enumerate(self.documents) if d["effective_bits"] <= bits + 1e-3]
                own = max(within, key=lambda i: self.documents[i]["effective_bits"], default=0)
                self.assertIn(f"the map below is that of {self.plans[own].name} (", said)
            else:
                seen.add(own)
        self.assertMap(self.documents[own])
        self.assertEqual(seen, {0, 1, 2})

    def test_a_plan_is_picked_and_compared(self):
        self.open()
        self.pick("#front select", "bits4")
        self.assertMap(self.documents[2])
        self.assertTrue(self.text("#budget-text").startswith("bits4: "))
        self.pick("#reference", "bits2.5")
        for side in "kv":
            change = [a - b for a, b in zip(self.map_of(self.documents[2], side), self.map_of(self.documents[0], side))]
            for shown, expected in zip(self.shown_map(side), change, strict=True):
                self.assertAlmostEqual(shown, expected, delta=0.0501)
        self.assertIn("bits4 minus that of bits2.5", self.text("#map-of"))

    def test_layer_and_head(self):
        self.open()
        self.browser.point_at("#maps figure:nth-of-type(2) [data-layer='1'][data-head='1']", click=True)
        rows = self.browser.evaluate("[...document.querySelectorAll('#cell-figures tbody')][0].innerText").splitlines()
        for plan, document in zip(self.plans, self.documents):
            widths = " ".join(map(str, document["layers"][1]["v"]["heads"][1]["widths"]))
            self.assertTrue(any(r.startswith(f"{plan.name}\tvalues") and f"\t{widths}\t" in r for r in rows), rows)
        self.assertEqual(self.browser.evaluate("[...document.querySelectorAll('#cell select')].map((s) => s.value)"), ["1", "1"])
        self.pick("#cell label:nth-of-type(1) select", "0")
        self.assertEqual(self.browser.evaluate("document.querySelector('#maps [aria-selected=true]').dataset.layer"), "0")

    def test_values_on_hover_and_focus(self):
        self.open()
        self.browser.point_at("#maps [data-layer='1'][data-head='0']")
        widths = " ".join(map(str, self.documents[0]["layers"][1]["k"]["heads"][0]["widths"]))
        self.assertIn(f"layer 1, KV head 0: widths {widths}", self.text("#tip"))
        self.assertFalse(self.browser.evaluate("document.getElementById('tip').hidden"))
        self.browser.press("Escape")
        self.assertTrue(self.browser.evaluate("document.getElementById('tip').hidden"))
        # also where the focus scrolls the page
        self.browser.evaluate("scrollTo(0, 0); document.querySelector('#outliers [role=gridcell]').focus()")
        self.browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))")
        top, bottom, height = self.browser.evaluate("(({top, bottom}) => [top, bottom, innerHeight])(document.getElementById('tip').getBoundingClientRect())")
        self.assertTrue(0 <= top < bottom <= height, "the tip is not where the reader looks")
        # a chart: the tooltip of Chart.js takes the nearest point
        self.browser.point_at("#front canvas")
        self.assertTrue(self.browser.evaluate("Chart.getChart(document.querySelector('#front canvas')).tooltip.body.length > 0"))


class Accessible(Report):
    def colours(self, selector):
        return self.browser.evaluate(f"""(() => {{
            const node = document.querySelector({json.dumps(selector)});
            let behind = node;
            while (/rgba\\(.*, 0\\)/.test(getComputedStyle(behind).backgroundColor)) behind = behind.parentElement;
            return [getComputedStyle(node).color, getComputedStyle(behind).backgroundColor];
        }})()""")

    def test_theme_follows_the_system_or_the_switch(self):
        self.open()
        backgrounds, drawn = {}, {}
        for system, switch in (("light", "system"), ("dark", "system"), ("dark", "light"), ("light", "dark")):
            self.browser.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
            self.pick("#theme select", switch)
            theme = system if switch == "system" else switch
            with self.subTest(system=system, switch=switch):
                background = self.browser.evaluate("getComputedStyle(document.body).backgroundColor")
                self.assertEqual(background, backgrounds.setdefault(theme, background))
                drawing = self.browser.evaluate("[document.querySelector('#front canvas').toDataURL(), document.querySelector('#maps td').style.background]")
                self.assertEqual(drawing, drawn.setdefault(theme, drawing))
                axis = self.browser.evaluate("Chart.getChart(document.querySelector('#front canvas')).scales.x.options.title.color")
                self.assertEqual(axis, self.browser.evaluate("css('--muted')"))
                for selector in ("h1", "#subtitle", ".tile span", ".tile b", "#validation th button", "#validation tr.plan td", "figcaption",
                                 "#budget-text", "#theme select", "#maps th", "summary", ".passed", ".failed", "a.skip"):
                    if selector in (".passed", ".failed"):
                        self.browser.evaluate(f"document.querySelector('main').append(element('b', {{class: '{selector[1:]}'}}, 'x'))")
                    self.assertGreaterEqual(contrast(*self.colours(selector)), MIN_CONTRAST, selector)
                for row in self.browser.evaluate("[...document.querySelectorAll('#maps td')].map((n) => [getComputedStyle(n).color, getComputedStyle(n).backgroundColor])"):
                    self.assertGreaterEqual(contrast(*row), MIN_CONTRAST, row)
        self.assertNotEqual(backgrounds["light"], backgrounds["dark"])
        for light, dark in zip(drawn["light"], drawn["dark"], strict=True):
            self.assertNotEqual(light, dark, "canvas or map kept its colours")
        self.browser.call("Emulation.setEmulatedMedia", features=[])

    def test_all_is_reached_and_used_by_keyboard(self):
        self.open()
        focused = "document.activeElement"
        self.browser.press("Tab")
        self.assertEqual(self.browser.evaluate(f"{focused}.className"), "skip")
        reached = []
        for _ in range(200):
            self.browser.press("Tab")
            reached.append(self.browser.evaluate(f"""{focused} === document.body ? null : [{focused}.tagName, {focused}.id, {focused}.closest('section')?.id ?? '',
                {focused}.getAttribute('role') ?? '', getComputedStyle({focused}).outlineStyle]"""))
            if reached[-1] is None:
                break
        self.assertIsNone(reached.pop(), "the focus never left the page")
        self.assertIn(["INPUT", "budget", "front", "", "solid"], reached)
        self.assertIn("SELECT", [r[0] for r in reached if r[2] == "cell"])
        self.assertEqual(sum(r[2] == "bits" and r[3] == "gridcell" for r in reached), 2, "one stop for each map")
        self.assertEqual([r for r in reached if r[4] == "none"], [], "focus that cannot be seen")

        self.browser.evaluate("document.getElementById('budget').focus()")
        self.browser.press("Home")
        lowest = self.text("#budget-text")
        self.browser.press("ArrowRight", times=2)
        self.assertNotEqual(self.text("#budget-text"), lowest)
        self.assertEqual(self.browser.evaluate("document.getElementById('budget').value"), "2")

        self.browser.evaluate("document.querySelector('#maps [role=gridcell]').focus()")
        for key in ("ArrowRight", "ArrowDown"):
            self.browser.press(key)
        self.assertEqual(self.browser.evaluate(f"[{focused}.dataset.layer, {focused}.dataset.head]"), ["1", "1"])
        self.assertIn("layer 1, KV head 1", self.text("#tip"))
        self.browser.press("Enter")
        self.assertEqual(self.browser.evaluate(f"{focused}.getAttribute('aria-selected')"), "true")
        self.browser.press("Home")
        self.assertEqual(self.browser.evaluate(f"{focused}.dataset.layer"), "0")

        self.browser.evaluate("document.querySelector('#plans th:nth-child(2) button').focus()")
        self.browser.press(" ")
        self.assertEqual(self.browser.evaluate("document.querySelector('#plans th:nth-child(2)').getAttribute('aria-sort')"), "ascending")

    def test_everything_has_a_name(self):
        self.open()
        nodes = self.browser.call("Accessibility.getFullAXTree")["nodes"]
        kinds = {"button", "combobox", "slider", "gridcell", "grid", "img", "image", "Canvas", "link", "region", "heading"}
        found = [n for n in nodes if not n.get("ignored") and n["role"]["value"] in kinds]
        self.assertLessEqual({"button", "combobox", "slider", "gridcell", "grid", "link", "region"}, {n["role"]["value"] for n in found})
        self.assertEqual([n["role"]["value"] for n in found if not n.get("name", {}).get("value")], [])
        self.assertEqual(self.browser.evaluate("document.documentElement.lang"), "en")
        ids = self.browser.evaluate("[...document.querySelectorAll('[id]')].map((n) => n.id)")
        self.assertEqual(len(ids), len(set(ids)))

    def test_print(self):
        self.open()
        self.pick("#theme select", "dark")
        dark = self.browser.evaluate("getComputedStyle(document.body).backgroundColor")
        document = base64.b64decode(self.browser.call("Page.printToPDF", printBackground=True)["data"])
        self.assertTrue(document.startswith(b"%PDF-"))
        self.assertEqual(self.browser.evaluate("getComputedStyle(document.body).backgroundColor"), dark, "the theme came back after printing")
        # A4 upright less margins, at 96 pixels per inch
        self.browser.call("Emulation.setDeviceMetricsOverride", width=718, height=1000, deviceScaleFactor=1, mobile=False)
        self.browser.call("Emulation.setEmulatedMedia", media="print")
        self.assertLessEqual(self.browser.evaluate("document.documentElement.scrollWidth"), 718, "the paper is too narrow")
        self.browser.evaluate("dispatchEvent(new Event('beforeprint'))")
        self.assertEqual(self.browser.evaluate("getComputedStyle(document.body).backgroundColor"), "rgb(255, 255, 255)")
        self.assertEqual(self.browser.evaluate("[...document.querySelectorAll('.controls')].filter((n) => n.offsetParent).length"), 0)
        self.browser.evaluate("dispatchEvent(new Event('afterprint'))")
        self.browser.call("Emulation.setEmulatedMedia", media="")
        self.browser.call("Emulation.clearDeviceMetricsOverride")


if __name__ == "__main__":
    main()
