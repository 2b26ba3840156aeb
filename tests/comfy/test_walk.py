"""The memory panel in a real browser on a real ComfyUI: its own "Unload models and execution cache", and our buttons.

Each version of ComfyUI runs with the front end that the panel must work with beside it. A tiny diffusion model is kept
and a tiny text encoder is not, on a simulated card of 16 GiB. Screenshots go to STEADYVSR_SCREENSHOTS, else to a
temporary folder.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from steadyvsr.tests.comfy.test_free_server import MODEL_FILE, A, B, Turns, start
from steadyvsr.tests.web.test_panel import (
    CHROMIUM,
    FOLDER,
    WAIT_MS,
    opened_panel,
    panel,
    playwright,
    screenshot,
    tab,
    until,
)  # fmt: skip

pytestmark = pytest.mark.comfy

OLD, NEW = "1.27.10", "1.58.1"
BOOT_MS = 60_000
MIB = 1 << 20


def frontend_of(checkout: Path) -> str:
    """The front end to show a version of ComfyUI with: the oldest that we support with the oldest, else the newest."""
    return OLD if '"0.3.' in (checkout / "comfyui_version.py").read_text() else NEW


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("needs Chromium: none of chromium, chromium-browser, google-chrome is on PATH")
    with playwright.sync_playwright() as driver:
        launched = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield launched
        launched.close()


@pytest.fixture(scope="module")
def booted(browser) -> Iterator[dict[Path, tuple[Turns, Any]]]:
    """One server and one page for all tests of a version: starting them is what takes time."""
    known: dict[Path, tuple[Turns, Any]] = {}
    yield known
    for turns, page in known.values():
        page.close()
        turns.server.stop()


@pytest.fixture
def walk(browser, booted, comfyui_path: Path, tmp_path: Path) -> Iterator[tuple[Turns, Any]]:
    """A server that has run both models, the first kept, and a page of it whose panel is closed."""
    frontend = frontend_of(comfyui_path)
    static = FOLDER / frontend / "comfyui_frontend_package" / "static"
    if not (static / "index.html").is_file():
        pytest.skip(f"needs the front end {frontend}, unpacked under {FOLDER.name}/{frontend}")
    if comfyui_path not in booted:
        turns = start([], comfyui_path, tmp_path, "--front-end-root", str(static))
        booted[comfyui_path] = turns, browser.new_page(viewport={"width": 1400, "height": 1500})
        turns.server.post("/settings", {"Comfy.TutorialCompleted": True})
    turns, page = booted[comfyui_path]
    turns.server.post("/steadyvsr/release", {})
    turns.press(unload_models=True, free_memory=True)
    assert residents(turns) == {}
    turns.run("model", "clip")
    page.goto(turns.server.url)
    tab(page).wait_for(timeout=BOOT_MS)
    page.wait_for_timeout(500)
    for _ in range(2):  # greetings of the front end
        page.keyboard.press("Escape")
    if panel(page).count():  # a reload opens it again
        tab(page).click()
    until(page, lambda: not state(turns)["push"]["running"], "a closed panel")
    yield turns, page


def legend(page) -> dict[str, str]:
    """The numbers of the card; the RAM has a list of its own."""
    rows = panel(page).locator(".svr-devices > .svr-card").first.locator(".svr-legend-row")
    return {row.get_attribute("data-part"): row.locator("dd").inner_text() for row in rows.all() if row.is_visible()}


def shown(page) -> list[str]:
    """Names of the models in the panel's table."""
    return sorted(panel(page).locator(".svr-model-name").all_inner_texts())


def newest(page) -> str:
    return "".join(panel(page).locator(".svr-receipt").all_inner_texts()[:1])


def in_words(bytes: int) -> str:
    return f"{bytes / MIB:.1f} MiB"


def state(turns: Turns) -> dict:
    return turns.server.get("/steadyvsr/state")


def residents(turns: Turns) -> dict[str, dict]:
    return {model["name"]: model for model in state(turns)["residents"]}


def receipts(turns: Turns) -> list[dict]:
    return turns.server.get("/steadyvsr/receipts")["receipts"]


def press_in_the_edit_menu(page) -> None:
    """ComfyUI's own entry, by mouse."""
    page.locator(".comfyui-logo").first.click()
    page.get_by_text("Edit", exact=True).first.hover(timeout=WAIT_MS)
    page.get_by_text("Unload Models and Execution Cache").first.click(timeout=WAIT_MS)


def test_a_kept_model_stays_through_comfyuis_own_button_and_the_panel_says_what_went(walk, comfyui_path, tmp_path):
    turns, page = walk
    before = residents(turns)
    kept, other = before[B]["bytes"], before[A]["bytes"]
    assert set(before) == {A, B} and before[B]["policy"] == "keep" and before[A]["policy"] == "no"
    assert kept > MIB and other > MIB and state(turns)["push"]["running"] is False
    opened_panel(page)
    assert shown(page) == [B, A]
    until(page, lambda: receipts(turns) == [] or panel(page).locator(".svr-receipt").count() > 0, "earlier receipts")
    earlier = [receipt["id"] for receipt in receipts(turns)]
    assert (legend(page)["kept"], legend(page)["models"]) == (in_words(kept), in_words(other))
    screenshot(page, f"walk_{comfyui_path.name}_before", tmp_path)

    press_in_the_edit_menu(page)
    # Nothing of ours was touched: the push and the receipt come by themselves.
    until(page, lambda: shown(page) == [B], "the end of the model that nobody keeps")
    until(page, lambda: f"{A} · not kept · went" in newest(page), "the receipt")
    assert legend(page)["kept"] == in_words(kept) and legend(page)["models"] == "0 MiB"
    (row,) = panel(page).locator(".svr-model").all()
    assert in_words(kept) in row.inner_text() and row.get_attribute("data-policy") == "keep"
    page.mouse.move(900, 800)
    screenshot(page, f"walk_{comfyui_path.name}_after", tmp_path)

    after = residents(turns)
    assert set(after) == {B} and after[B] == {**before[B], "last_used": after[B]["last_used"]}
    (receipt,) = [receipt for receipt in receipts(turns) if receipt["id"] not in earlier]
    told = {line["name"]: (line["policy"], line["stayed"], line["before"], line["after"]) for line in receipt["models"]}
    assert told == {B: ("keep", True, kept, kept), A: ("no", False, other, 0)}
    text = newest(page)
    assert f"{B} · kept · stayed with {in_words(kept)}" in text
    assert f"{A} · not kept · went, {in_words(other)}" in text
    assert receipt["title"] in text and receipt["line"] in text and MODEL_FILE in receipt["line"]

    turns.run("model", "clip")
    until(page, lambda: shown(page) == [B, A], "the models of the next prompt")
    turns.press(unload_models=True)
    assert turns.kept()[B]["loads"] == 1, "the kept model was not read again"


@pytest.mark.parametrize(
    "flags", [{"unload_models": True}, {"unload_models": True, "free_memory": True}], ids=["models", "models and cache"]
)
def test_what_the_two_buttons_of_comfyui_manager_send_takes_the_same_models(walk, flags):
    turns, page = walk
    before = turns.presses()
    status = page.evaluate(
        """async flags => {
          const {api} = await import("/scripts/api.js");
          const headers = {"Content-Type": "application/json"};
          return (await api.fetchApi("/free", {method: "POST", headers, body: JSON.stringify(flags)})).status;
        }""",
        flags,
    )
    assert status == 200
    turns.until(lambda: turns.presses() > before, "the press")
    assert turns.listed() == [B] and turns.kept()[B]["loads"] == 1


def test_each_button_of_the_panel_does_to_real_models_what_its_receipt_says(walk, comfyui_path, tmp_path):
    turns, page = walk
    sizes = {name: model["size"] for name, model in residents(turns).items()}
    opened_panel(page)

    def click(name: str) -> None:
        panel(page).get_by_role("button", name=name, exact=True).click()

    click(f"Offload {B}")
    first = panel(page).locator(".svr-receipt").first
    until(page, lambda: f"Offload {B}" in newest(page), "a receipt")
    until(page, lambda: first.get_attribute("data-result") == "good", "the measured receipt")
    assert f"Offload {B}" in newest(page) and residents(turns)[B]["bytes"] == 0
    assert f"{sizes[B] / MIB:.2f}" in newest(page)
    until(page, lambda: legend(page)["kept"] == "0 MiB", "the card without the kept model")
    turns.run("model", "clip")
    until(page, lambda: legend(page)["kept"] == in_words(sizes[B]), "the kept model back on the card")
    click(f"Keep {A}")
    until(page, lambda: residents(turns)[A]["policy"] == "keep", "the new policy")
    click("Free everything but kept")
    until(page, lambda: f"{A} · kept · stayed" in newest(page), "the receipt of the press")
    assert set(residents(turns)) == {A, B}
    click(f"Release {A}")
    until(page, lambda: newest(page).startswith("Release") and "no longer kept" in newest(page), "the receipt")
    click("Unload models")
    until(page, lambda: shown(page) == [B], "the end of the released model")
    click("Release kept too")
    until(page, lambda: shown(page) == [], "an empty list")
    until(page, lambda: residents(turns) == {}, "an empty server")
    page.mouse.move(900, 800)
    screenshot(page, f"walk_{comfyui_path.name}_buttons", tmp_path)


def test_the_server_samples_while_the_panel_is_open_and_not_after(walk):
    turns, page = walk
    closed = state(turns)["push"]
    opened_panel(page)
    until(page, lambda: state(turns)["push"]["pushes"] >= closed["pushes"] + 3, "three pushes")
    during = state(turns)["push"]
    assert during["running"] and during["cpu_seconds"] > closed["cpu_seconds"]
    assert during["pushes"] - closed["pushes"] <= 2 * (during["seconds"] - closed["seconds"]) + 2
    tab(page).click()
    until(page, lambda: not state(turns)["push"]["running"], "the end of the thread")
    ended = state(turns)["push"]
    page.wait_for_timeout(2500)
    assert state(turns)["push"] == ended
    opened_panel(page)
    until(page, lambda: state(turns)["push"]["pushes"] > ended["pushes"], "the push after opening it again")
    page.goto("about:blank")  # a page that is gone without saying so
    until(page, lambda: not state(turns)["push"]["running"], "the end of the thread without a goodbye")
