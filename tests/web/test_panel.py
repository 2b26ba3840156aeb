"""The memory panel in a real browser, in the oldest and the newest front end, against a server with scripted numbers.

Needs Chromium, playwright and the unpacked front ends (scripts/environment.sh fetches what it can); skipped with the
reason where one is missing. Screenshots go to the folder named by STEADYVSR_SCREENSHOTS, else to a temporary one.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FRONTENDS = ("1.27.10", "1.58.1")
FOLDER = Path(os.environ.get("STEADYVSR_FRONTENDS") or ROOT / ".venv" / "frontends")
JS_LIMIT_BYTES = 60_000
GIB = 1 << 30
WAIT_MS = 20_000

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install -e .[test]")
pytest.importorskip("aiohttp", reason="needs aiohttp: pip install -e .[test]")

from steadyvsr.tests.web.frontend_server import FrontendServer, receipt, scripted_state  # noqa: E402

# Counts what our own files start, by the stack of the call, and what they listen to.
COUNTER = """
window.ours = {timers: 0};
for (const name of ["setInterval", "setTimeout", "requestAnimationFrame"]) {
  const original = window[name];
  window[name] = function (...values) {
    // Line 0 is the message, 1 this function, 2 who called it; deeper lines may be ours while the front end works.
    if (new Error().stack.split("\\n")[2]?.includes("/extensions/steadyvsr/")) window.ours.timers += 1;
    return original.apply(this, values);
  };
}
"""
LISTENERS = """async () => {
  const {api} = await import("/scripts/api.js");
  if (window.counted) return;
  window.counted = {};
  for (const [method, step] of [["addEventListener", 1], ["removeEventListener", -1]]) {
    const original = api[method];
    api[method] = function (name, ...rest) {
      if (new Error().stack.includes("/extensions/steadyvsr/"))
        window.counted[name] = (window.counted[name] ?? 0) + step;
      return original.call(this, name, ...rest);
    };
  }
}"""

COMBO = {"keep_loaded": [["no", "keep", "pin"], {"default": "no"}], "attention": [["auto", "gather", "new"], {}]}
OBJECT_INFO = {
    "SteadyVSR_LoadFlashVSR": {
        "input": {"required": COMBO}, "input_order": {"required": list(COMBO)}, "output": ["FLASHVSR"],
        "output_is_list": [False], "output_name": ["FLASHVSR"], "name": "SteadyVSR_LoadFlashVSR",
        "display_name": "Load FlashVSR", "description": "", "python_module": "custom_nodes.steadyvsr",
        "category": "SteadyVSR", "output_node": False,
    }
}  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: none of chromium, chromium-browser, google-chrome is on PATH")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module", params=FRONTENDS)
def static(request: pytest.FixtureRequest) -> Path:
    folder = FOLDER / request.param / "comfyui_frontend_package" / "static"
    if not (folder / "index.html").is_file():
        pytest.skip(f"needs the front end {request.param}, unpacked under {FOLDER.name}/{request.param}")
    return folder


@pytest.fixture(scope="module")
def booted(browser, static: Path) -> Iterator[tuple]:
    """One page for all tests of a front end: starting it is what takes time."""
    with FrontendServer(static, OBJECT_INFO) as server:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.add_init_script(COUNTER)
        yield boot(page, server), server
        page.close()


@pytest.fixture
def server(booted) -> FrontendServer:
    return booted[1]


@pytest.fixture
def page(booted) -> Iterator:
    page, server = booted
    server.posts.clear()
    server.answers.clear()
    server.state = scripted_state()
    server.receipts = []
    yield page
    if panel(page).count():
        tab(page).click()
        until(page, lambda: server.watching == set(), "the end of the push")


def boot(page, server: FrontendServer):
    page.goto(server.address)
    tab(page).wait_for(timeout=WAIT_MS)
    page.wait_for_timeout(500)
    for _ in range(2):  # greetings of the front end
        page.keyboard.press("Escape")
    return page


def tab(page):
    return page.locator("button[aria-label*='SteadyVSR memory']").first


def panel(page):
    return page.locator(".svr-panel")


def opened_panel(page):
    tab(page).click()
    panel(page).locator(".svr-model").first.wait_for(timeout=WAIT_MS)
    return panel(page)


def legend(page) -> dict[str, str]:
    rows = panel(page).locator(".svr-legend-row")
    return {row.get_attribute("data-part"): row.locator("dd").inner_text() for row in rows.all() if row.is_visible()}


def posted(server: FrontendServer, route: str) -> list:
    return [body for name, body in server.posts if name == route]


def until(page, condition, what: str) -> None:
    for _ in range(100):
        if condition():
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"never came: {what}")


def screenshot(page, name: str, tmp_path: Path) -> None:
    folder = Path(os.environ.get("STEADYVSR_SCREENSHOTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=str(folder / f"{name}.png"))


def test_the_panel_opens_and_shows_the_numbers_of_the_server(page, server):
    assert panel(page).count() == 0 and server.watching == set()
    opened_panel(page)
    assert legend(page) == {
        "kept": "6.00 GiB", "models": "3.00 GiB", "working": "1.00 GiB", "pool": "3.00 GiB", "others": "2.00 GiB",
        "free": "9.00 GiB",
    }  # fmt: skip
    assert panel(page).locator(".svr-device-name").inner_text() == "cuda:0 · Test card"
    assert [row.inner_text() for row in panel(page).locator(".svr-model-name").all()] == ["WAN21", "WanVAE"]
    assert "blender (4242) 2.00 GiB" in panel(page).inner_text()
    assert len(server.watching) == 1


def test_what_cannot_be_measured_is_called_unknown(page, server):
    state = scripted_state()
    state["devices"][0] |= {
        "used": None, "parts": dict.fromkeys(state["devices"][0]["parts"], None), "notes": ["NVML is not installed"],
    }  # fmt: skip
    server.state = state
    opened_panel(page)
    assert set(legend(page).values()) == {"unknown"}
    assert "unknown of 24.00 GiB" in panel(page).inner_text() and "NVML is not installed" in panel(page).inner_text()


def test_a_pushed_state_changes_numbers_badge_and_timeline_without_replacing_buttons(page, server):
    opened_panel(page)
    offload = panel(page).get_by_role("button", name="Offload WAN21")
    offload.focus()
    state = scripted_state(time=1010.0)
    state["devices"][0] |= {"used": 22 * GIB, "level": "critical"}
    state["devices"][0]["parts"]["working"] = 8 * GIB
    server.push("steadyvsr.state", state)
    until(page, lambda: legend(page)["working"] == "8.00 GiB", "the pushed number")
    assert "MODEL · bf16 · cuda:0 · 20 s ago" in panel(page).inner_text().replace("\u00a0", " ")
    assert offload.evaluate("element => element === document.activeElement")
    assert "almost full" in panel(page).inner_text()
    assert "92%" in tab(page).inner_text()
    assert panel(page).locator(".svr-timeline").get_attribute("aria-label").endswith("peak 22.00 GiB")
    assert drawn_columns(page) == []  # two readings so far: the line is 10 s long, at the right edge
    for step in range(2, 25):
        server.push("steadyvsr.state", scripted_state(time=1000.0 + 5 * step))
    until(page, lambda: len(drawn_columns(page)) > 30, "the line over the whole width")


def drawn_columns(page) -> list[int]:
    """Which fortieths of the timeline's width, but the last four, show the blue line."""
    return (
        panel(page)
        .locator(".svr-timeline")
        .evaluate(
            """canvas => {
          const {data, width, height} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
          const seen = new Set();
          for (let i = 0; i < width * height; i++) {
            const [r, g, b, a] = data.slice(4 * i, 4 * i + 4);
            if (a > 100 && b > 150 && b > r + 60) seen.add(Math.floor((i % width) / width * 40));
          }
          return [...seen].filter(column => column < 36);
        }"""
        )
    )


BUTTONS = [
    ("Unload models", "free", {"unload_models": True, "free_memory": False}),
    ("Free everything but kept", "free", {"unload_models": True, "free_memory": True}),
    ("Offload WAN21", "offload", {"handle": "m1"}),
    ("Release WAN21", "release", {"ids": ["0123456789ab"]}),
    ("Keep WanVAE", "policy", {"id": "ba9876543210", "policy": "keep"}),
]


@pytest.mark.parametrize(("name", "route", "body"), BUTTONS, ids=[name for name, _, _ in BUTTONS])
def test_each_button_posts_what_it_should_and_shows_its_receipt(page, server, name, route, body):
    opened_panel(page)
    server.answers[route] = lambda _: (200, {"receipt": receipt("r1", name, "asked 6.00 GiB · left the tensors 6.00")})
    panel(page).get_by_role("button", name=name, exact=True).click()
    shown = panel(page).locator(".svr-receipt")
    shown.wait_for(timeout=WAIT_MS)
    assert posted(server, route) == [body]
    assert "asked 6.00 GiB · left the tensors 6.00" in shown.inner_text()
    assert shown.get_attribute("data-result") == "good"


def test_release_kept_too_gives_up_ownership_before_it_frees(page, server):
    opened_panel(page)
    panel(page).get_by_role("button", name="Release kept too").click()
    until(page, lambda: posted(server, "free"), "the second request")
    asked = [entry for entry in server.posts if entry[0] in ("release", "free")]
    assert asked == [("release", {}), ("free", {"unload_models": True, "free_memory": True})]


def test_a_press_elsewhere_gets_its_receipt_here_too(page, server):
    opened_panel(page)
    models = [
        {"name": "WAN21", "policy": "keep", "stayed": True, "before": 6 * GIB, "after": 6 * GIB},
        {"name": "WanVAE", "policy": "no", "stayed": False, "before": 3 * GIB, "after": 0},
    ]
    server.push("steadyvsr.receipt", receipt("p1", "Unload models", "3.00 GiB left cuda:0", models=models))
    panel(page).locator(".svr-receipt").wait_for(timeout=WAIT_MS)
    text = panel(page).locator(".svr-receipt").inner_text()
    assert "WAN21 · kept · stayed with 6.00 GiB" in text and "WanVAE · not kept · went, 3.00 GiB" in text


def test_a_refused_action_says_the_servers_words(page, server):
    opened_panel(page)
    server.answers["offload"] = lambda _: (404, {"error": "no model m1 is loaded any more"})
    panel(page).get_by_role("button", name="Offload WAN21").click()
    shown = panel(page).locator(".svr-receipt")
    shown.wait_for(timeout=WAIT_MS)
    assert "no model m1 is loaded any more" in shown.inner_text() and shown.get_attribute("data-result") == "bad"


def test_the_panel_says_that_the_server_is_gone_and_goes_on_when_it_is_back(page, server):
    opened_panel(page)
    server.drop()
    until(page, lambda: "does not answer" in panel(page).inner_text(), "the warning")
    server.state["devices"][0]["parts"]["kept"] = 5 * GIB
    server.come_back()
    until(page, lambda: "does not answer" not in panel(page).inner_text(), "the return")
    assert legend(page)["kept"] == "5.00 GiB"
    assert len(posted(server, "watch")) >= 2


def test_a_reload_asks_for_the_numbers_anew(page, server):
    opened_panel(page)
    before = len(posted(server, "watch"))
    boot(page, server)
    if panel(page).count() == 0:
        tab(page).click()
    panel(page).locator(".svr-model").first.wait_for(timeout=WAIT_MS)
    assert len(posted(server, "watch")) > before


def test_closing_leaves_no_listener_no_timer_and_no_push(page, server):
    page.evaluate(LISTENERS)
    opened_panel(page)
    during = {k: v for k, v in page.evaluate("window.counted").items() if v}
    assert during == {"steadyvsr.state": 1, "steadyvsr.receipt": 1, "reconnecting": 1, "reconnected": 1}
    tab(page).click()
    until(page, lambda: panel(page).count() == 0, "the panel's end")
    assert set(page.evaluate("window.counted").values()) == {0}
    assert page.evaluate("window.ours.timers") == 0
    until(page, lambda: server.watching == set(), "the end of the push")


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "nodes2"])
@pytest.mark.parametrize("palette", ["dark", "light"])
def test_it_reads_well_in_both_themes_at_300_pixels(browser, static, tmp_path, palette, vue_nodes):
    if vue_nodes and static.parents[1].name == FRONTENDS[0]:
        pytest.skip("this front end has no Nodes 2.0 that draws widgets of extensions")
    settings = {"Comfy.ColorPalette": palette, "Comfy.VueNodes.Enabled": vue_nodes}
    with FrontendServer(static, OBJECT_INFO, settings) as server:
        page = browser.new_page(viewport={"width": 1400, "height": 1000})
        boot(page, server)
        opened_panel(page)
        line = (
            "asked 6.10 GiB · left the tensors 6.10 · left the driver 6.02 (NVML) · held 0.08 by ComfyUI's stream "
            "buffers · 0.41 s"
        )
        server.push("steadyvsr.receipt", receipt("r1", "Offload of a model with a very long name", line))
        for step in range(30):
            state = scripted_state(time=1000.0 + 4 * step)
            state["devices"][0]["used"] = (12 + step % 7) * GIB
            server.push("steadyvsr.state", state)
        page.mouse.move(900, 600)
        page.wait_for_timeout(300)
        screenshot(page, f"panel_{static.parents[1].name}_{palette}_{'nodes2' if vue_nodes else 'canvas'}", tmp_path)
        panel(page).evaluate("element => { element.style.width = '300px'; }")
        wide = panel(page).evaluate(
            """root => [...root.querySelectorAll("*")].filter(e => e.getBoundingClientRect().width
                && e.getBoundingClientRect().right > root.getBoundingClientRect().right + 1).map(e => e.className)"""
        )
        assert wide == []
        assert panel(page).evaluate("e => e.scrollWidth <= e.clientWidth")
        assert min(contrasts(page)) >= 4.5
        page.close()


def contrasts(page) -> list[float]:
    """Contrast (WCAG 2) of the panel's texts against the nearest opaque background."""
    return panel(page).evaluate(
        """root => {
          const numbers = (text) => text.match(/[0-9.]+/g).map(Number);
          const light = (rgb) => rgb.slice(0, 3).map(v => v / 255)
            .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          const ground = (e) => {
            for (; e; e = e.parentElement) {
              const c = numbers(getComputedStyle(e).backgroundColor);
              if (c.length < 4 || c[3] > 0.9) return c;
            }
            return [255, 255, 255];
          };
          const texts = root.querySelectorAll(
            ".svr-device-name, .svr-number, .svr-quiet, .svr-receipt-line, button:enabled");
          return [...texts].filter(e => e.textContent).map(e => {
            const [a, b] = [light(numbers(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
            return (a + 0.05) / (b + 0.05);
          });
        }"""
    )


@pytest.mark.parametrize("vue_nodes", [False, True], ids=["canvas", "nodes2"])
def test_a_node_shows_policy_progress_and_receipt_live(browser, static, tmp_path, vue_nodes):
    settings = {"Comfy.VueNodes.Enabled": vue_nodes, "SteadyVSR.DefaultPolicy": "keep"}
    if vue_nodes and static.parents[1].name == FRONTENDS[0]:
        pytest.skip("this front end has no Nodes 2.0 that draws widgets of extensions")
    with FrontendServer(static, OBJECT_INFO, settings) as server:
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        boot(page, server)
        id = page.evaluate(
            """async () => {
              const {app} = await import("/scripts/app.js");
              app.graph.clear();
              const node = window.LiteGraph.createNode("SteadyVSR_LoadFlashVSR");
              app.graph.add(node);
              node.pos = [300, 200];
              return node.id;
            }"""
        )
        line = page.locator(".svr-node").first
        line.wait_for(timeout=WAIT_MS)
        assert "Asked: kept" in line.inner_text()
        server.push("steadyvsr.node", {"node": str(id), "policy": "pin", "policy_reason": "node 7 asks for pin",
            "progress": {"phase": "decode", "frames": 40, "total": 160, "fps": 1.25, "eta": 96},
            "receipt": {"line": "asked 1.00 GiB · left the tensors 1.00", "verdict": "FREED"},
            "memory": {"predicted": 9 * GIB, "budget": 8 * GIB, "advice": "lower kv_ratio"}})  # fmt: skip
        until(page, lambda: "decode · 40 of 160 frames · 1.25 fps · 1:36 left" in line.inner_text(), "the progress")
        assert "pinned (node 7 asks for pin)" in line.inner_text()
        assert "asked 1.00 GiB" in line.inner_text() and "lower kv_ratio" in line.inner_text()
        screenshot(page, f"node_{static.parents[1].name}_{'nodes2' if vue_nodes else 'canvas'}", tmp_path)
        page.close()


def test_a_node_of_an_opened_workflow_shows_what_is_set_there(page, server):
    asked = page.evaluate(
        """async () => {
          const {app} = await import("/scripts/app.js");
          app.graph.clear();
          const node = window.LiteGraph.createNode("SteadyVSR_LoadFlashVSR");
          app.graph.add(node);
          node.configure({...node.serialize(), widgets_values: ["pin", "auto"]});
          await new Promise(done => setTimeout(done, 200));
          return node.widgets.find(w => w.name === "steadyvsr_status").element.innerText;
        }"""
    )
    assert "Asked: pinned" in asked


def test_the_attention_setting_offers_what_the_node_offers(page):
    offered = page.evaluate(
        """async () => {
          const {app} = await import("/scripts/app.js");
          const settings = app.extensions.find(({name}) => name === "SteadyVSR").settings;
          return settings.find(({id}) => id === "SteadyVSR.DefaultAttention").options();
        }"""
    )
    assert [(choice["text"], choice["value"]) for choice in offered] == [(name, name) for name in COMBO["attention"][0]]


def test_the_scripts_are_small_and_name_no_other_host():
    sources = {path: path.read_text(encoding="utf-8") for path in (ROOT / "web").rglob("*.js")}
    assert len(sources) > 3
    assert sum(len(text.encode()) for text in sources.values()) <= JS_LIMIT_BYTES
    assert [path.name for path, text in sources.items() if re.search(r"https?://|wss?://", text)] == []
