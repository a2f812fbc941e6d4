"""The viewer's page in headless Chromium: what a reader sees, clicks and types, and what may not happen."""

from __future__ import annotations

import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages import view
from stages.viewer import gather, serve
from stages.viewer import page as assembling
from tests.stages.viewer.test_gather import write_cache
from tests.support import viewer_samples
from tests.support.helpers import ROOT

playwright_api: Any = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
expect = playwright_api.expect
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine"),
]
DESKTOP = {"width": 1440, "height": 900}
PHONE = {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM)
        yield found
        found.close()


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(assembling.render(viewer_samples.document(viewer_samples.run())))
    return path


@pytest.fixture
def opened(browser) -> Iterator[Any]:
    """Opens a page; at the end of the test it may have neither logged nor asked for anything."""
    contexts, seen = [], []

    def open_page(path: Path, hash_: str = "", viewport: dict[str, int] = DESKTOP, **options: Any) -> Any:
        context = browser.new_context(viewport=viewport, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on(
            "request",
            lambda request: request.url.startswith(("file:", "data:", "blob:")) or seen.append(request.url),
        )
        page.goto(f"{path.as_uri()}{hash_}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


@pytest.fixture(scope="module")
def demo_run(forked, tmp_path_factory) -> Path:
    """A short run of the demo, traced."""
    folder = tmp_path_factory.mktemp("runs")
    sizes = {"max_steps": 4, "refresh_every": 2, "rollouts_per_refresh": 128, "eval_prompts": 16}
    keys = sizes | {"trace_every": 1, "warmup_steps": 1, "runs_dir": folder}
    given = [part for key, value in keys.items() for part in (f"--{key}", str(value))]
    forked.stage("stages.pipeline", "pipeline.yaml", *given).expect_success()
    return folder / "demo"


@pytest.fixture(scope="module", params=["demo", "real"])
def real_runs(request) -> list[Path]:
    """Folders of runs: of the demo, and of the pretrained pair as `make real` leaves them."""
    if request.param == "demo":
        return [request.getfixturevalue("demo_run")]
    found = sorted(path.parent for path in (ROOT / ".real" / "runs").glob("*/metrics.jsonl"))
    return found or pytest.skip("no runs of the pretrained pair; make real")


def wait_for_tokens(page) -> Any:
    page.wait_for_selector("#tokens .token")
    return page.locator("#tokens .token")


def fits(page) -> bool:
    return page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_overview_shows_verdict_results_curves_gate_and_provenance(opened, html):
    page = opened(html)
    assert page.locator("h1").inner_text() == "Solves 89.0% of held-out problems, up from 39.0%"
    assert page.locator(".verdict").inner_text().startswith("The student improved by 50.0 points")
    first = page.locator(".results tbody tr").first.inner_text()
    assert "39.0%" in first
    assert "32.3 – 45.7" in first
    page.wait_for_selector(".u-over")
    assert page.locator(".chart").count() == 9
    titles = page.locator(".frame figcaption b").all_inner_texts()
    assert titles == ["λ against D", "λ over the steps", "By position", "By age of the rollout"]
    assert page.locator("rect.bar").count() == 16
    assert "dualkl run demo --seed 0" in page.locator(".facts").inner_text()
    assert "cannot be read" in page.locator(".notes").inner_text()
    assert "step 41" in page.locator(".warnings").inner_text()


def test_hover_over_one_curve_reads_all_of_them(opened, html):
    page = opened(html)
    page.wait_for_selector(".chart:nth-child(3) .u-over")
    over = page.locator(".chart .u-over").first
    over.scroll_into_view_if_needed()
    for x in (140, 150):
        page.wait_for_timeout(200)  # uPlot takes the place of a chart from scroll events
        over.hover(position={"x": x, "y": 60})
    expect(page.locator("#at-step")).to_have_text(re.compile("^step "))
    assert page.locator(".chart:nth-child(3) .one.now").count() == 2


def test_arrow_keys_read_a_curve_and_smoothing_redraws_it(opened, html):
    page = opened(html)
    page.wait_for_selector(".u-over")
    page.locator(".chart").first.focus()
    page.keyboard.press("Home")
    assert page.locator("#said").inner_text().startswith("step 1: loss ")
    page.get_by_label("Smoothing, steps").fill("3")
    assert page.locator(".slide output").inner_text() == "8 steps"


def test_runs_are_overlaid_by_name_with_their_differing_keys(opened, tmp_path):
    runs = [viewer_samples.run("calm"), viewer_samples.run("bold", seed=1)]
    (tmp_path / "two.html").write_text(assembling.render(viewer_samples.document(*runs)))
    page = opened(tmp_path / "two.html")
    page.locator(".chart").first.scroll_into_view_if_needed()
    page.wait_for_selector(".u-over")
    assert re.findall("calm|bold", page.locator(".chart").first.inner_text()) == ["calm", "bold"]
    keys = page.locator("section", has_text="keys that differ").locator("tbody th").all_inner_texts()
    assert keys == ["lr", "seed"]
    compared = page.get_by_role("region", name="Runs compared")
    assert "89.0%" in compared.locator("tbody tr").first.inner_text()
    assert compared.locator("thead th").all_inner_texts() == ["calm", "bold"]
    page.get_by_role("checkbox", name="bold").uncheck()
    assert "bold" not in page.locator(".chart").first.inner_text()


@pytest.mark.slow
@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_pages_of_real_runs_are_searched_clicked_and_compared(opened, real_runs, tmp_path, viewport):
    def written(name: str, runs: list[Path]) -> Path:
        path = tmp_path / name
        path.write_text(assembling.render(gather.page_data([view.source(str(run)) for run in runs])))
        return path

    one = written("one.html", real_runs[:1])
    page = opened(one, viewport=viewport)
    page.locator(".chart").first.scroll_into_view_if_needed()  # charts are drawn when they come into view
    page.wait_for_selector(".chart canvas")
    assert fits(page)
    page = opened(one, "#rollouts")
    wait_for_tokens(page).nth(1).click()
    page.wait_for_selector(".inspected")
    before = page.locator(".inspector").inner_text()
    page.keyboard.press("ArrowRight")
    expect(page.locator(".inspector")).not_to_have_text(before)
    assert page.locator(".top5").count() >= 1
    page.get_by_label("Search").fill("no rollout holds this text")
    expect(page.locator(".count")).to_contain_text("0 of ")
    compared = opened(written("two.html", (real_runs * 2)[:2]), viewport=viewport)
    expect(compared.locator(".chart").first).to_be_visible()
    assert len(compared.get_by_role("checkbox").all()) >= 2
    assert fits(compared)


def test_search_filter_and_sort_change_the_list(opened, html):
    page = opened(html, "#rollouts")
    wait_for_tokens(page)
    assert page.locator(".count").inner_text() == "24 rollouts"
    page.get_by_label("Show").select_option("cut")
    expect(page.locator(".count")).to_have_text("8 of 24 rollouts")
    page.get_by_label("Show").select_option("all")
    page.get_by_label("Sort").select_option("shortest")
    expect(page.locator(".row[aria-selected=true]")).to_have_attribute("aria-posinset", "1")
    counts = [
        int(text.split(" tokens")[0].split()[-1]) for text in page.locator(".row .meta").all_inner_texts()
    ]
    assert counts == sorted(counts)
    page.get_by_label("Search").fill("fibonacci")
    expect(page.locator(".count")).to_have_text("6 of 24 rollouts")


def test_a_clicked_token_shows_both_top_fives_and_the_gate(opened, html):
    page = opened(html, "#rollouts?row=g0000-00002")
    wait_for_tokens(page).nth(5).click()
    page.wait_for_selector(".inspected")
    assert page.locator(".top5").count() == 2
    assert page.locator(".top5 li:not(.rest)").count() == 10
    text = page.locator(".inspector").inner_text()
    assert "6 of " in text
    assert "Rank, teacher" in text
    assert "reverse" in page.locator(".gauge").inner_text()


def test_the_tokens_that_are_farthest_apart_are_listed_and_opened(opened, html):
    page = opened(html)
    rows = page.get_by_role("region", name="Tokens that are farthest apart").locator("tbody tr")
    expect(rows).to_have_count(10)
    shown = rows.locator("td:nth-child(2)").all_inner_texts()
    assert shown == sorted(shown, key=float, reverse=True)
    rows.first.get_by_role("button").click()
    page.wait_for_selector(".inspected")
    expect(page.locator(".measures dt:text-is('Reverse KL') + dd")).to_contain_text(shown[0])


def test_buttons_lead_to_other_tokens_and_rollouts(opened, html):
    page = opened(html, "#rollouts")
    wait_for_tokens(page).nth(2).click()
    page.get_by_role("button", name="Next token").click()
    assert page.evaluate("STATE.token") == 3
    page.get_by_role("button", name="Previous token").click()
    assert page.evaluate("STATE.token") == 2
    page.get_by_role("button", name="Next rollout").click()
    expect(page.locator(".row[aria-selected=true]")).to_have_attribute("aria-posinset", "2")


def test_controls_keep_the_focus_when_what_they_show_changes(opened, tmp_path):
    runs = [viewer_samples.run("calm"), viewer_samples.run("bold", seed=1)]
    (tmp_path / "two.html").write_text(assembling.render(viewer_samples.document(*runs)))
    page = opened(tmp_path / "two.html", "#rollouts")
    wait_for_tokens(page).nth(2).click()
    for name in ("Next token", "Next rollout", "bold"):
        button = page.get_by_role("button", name=name)
        button.focus()
        page.keyboard.press("Enter")
        page.wait_for_timeout(200)
        expect(button).to_be_focused()
        wait_for_tokens(page)
    wait_for_tokens(page).nth(2).click()
    page.get_by_role("button", name="Close the token").press("Enter")
    expect(page.locator("#tokens")).to_be_focused()


def test_a_screen_reader_hears_words_apart_and_a_heading_of_each_view(opened, html):
    page = opened(html)
    tree = page.locator("body").aria_snapshot()
    assert "own text nats/token" in tree
    for name in ("rollouts", "answers", "help"):
        page.evaluate("(view) => go({ view })", name)
        expect(page.locator("h1")).to_have_count(1)
    page.evaluate("go({ view: 'rollouts', row: 'g0000-00002', token: 3 })")
    page.wait_for_selector(".inspected")
    assert re.search(r"definition: \S*\d nats", page.locator(".inspector").aria_snapshot())


def test_answers_say_how_many_prompts_they_are_of(opened, tmp_path):
    run = viewer_samples.run() | {"prompts": 200}
    (tmp_path / "some.html").write_text(assembling.render(viewer_samples.document(run)))
    page = opened(tmp_path / "some.html", "#answers")
    assert "The first 16 of 200 held-out prompts" in page.locator(".bar").inner_text()


def test_the_keyboard_alone_reads_rows_and_tokens(opened, html):
    page = opened(html, "#rollouts")
    tokens = wait_for_tokens(page)
    first = page.evaluate("STATE.row")
    page.keyboard.press("j")
    expect(page.locator(".row[aria-selected=true]")).to_have_attribute("aria-posinset", "2")
    expect(page.locator(".id")).not_to_have_attribute("title", first)
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "End", "ArrowLeft"):
        page.keyboard.press(key)
    count = page.evaluate("view.shown.nodes.length")
    assert page.evaluate("STATE.token") == count - 2
    page.wait_for_selector(".inspected")
    assert f"token {count - 1} of {count}" in page.locator("#said").inner_text()
    page.keyboard.press("Escape")
    assert page.locator(".inspector").is_hidden()
    colour = page.evaluate("STATE.colour")
    page.keyboard.press("c")
    assert page.evaluate("STATE.colour") != colour
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert "Reverse KL" in page.locator(".help").inner_text()
    assert tokens.count() == 0


def test_a_link_reopens_row_token_and_colour(opened, html):
    page = opened(html, "#rollouts")
    wait_for_tokens(page)
    page.get_by_label("Colour the tokens by").select_option("teacher_entropy")
    page.keyboard.press("j")
    for _ in range(4):
        page.keyboard.press("ArrowRight")
    page.wait_for_selector(".inspected")
    state = page.evaluate("[STATE.row, STATE.token, STATE.colour]")
    again = opened(html, page.evaluate("location.hash"))
    again.wait_for_selector(".inspected")
    assert again.evaluate("[STATE.row, STATE.token, STATE.colour]") == state
    assert state[1:] == [3, "teacher_entropy"]


def test_model_text_is_shown_and_never_run(opened, html):
    page = opened(html, "#rollouts?row=g0000-00000")
    wait_for_tokens(page)
    text = page.locator("#tokens").inner_text()
    assert viewer_samples.HOSTILE in text
    assert "␛[31mred⟨202E⟩gnp.exe⟨2066⟩␇" in text
    assert viewer_samples.HOSTILE in page.locator(".turn.user").inner_text()
    assert page.locator("#tokens .chip.bytes").first.inner_text() == "e2 82"
    assert page.evaluate("window.hacked") is None
    assert page.locator("#main img").count() == 0


ADDRESSES = (
    "#constructor",
    "#__proto__",
    "#rollouts?row=%3Cscript%3E",
    "#rollouts?token=99999",
    "#rollouts?colour=__proto__",
    "#rollouts?sort=constructor&show=toString&refresh=x&prompt=y",
    "#rollouts?%",
    "#answers?outcome=constructor",
)


@pytest.mark.parametrize("address", ADDRESSES)
def test_any_address_opens_a_view(opened, html, address):
    page = opened(html, address)
    page.wait_for_selector("#main h1")
    page.wait_for_timeout(100)
    assert page.get_by_role("alert").count() == 0


def test_format_characters_are_shown_and_joiners_join(opened, html):
    page = opened(html)
    shown = page.evaluate(
        "(texts) => texts.map(visible)",
        ["a\u00adb\ufff9", "\U000e0041", "👨\u200d👩", "می\u200cخواهم", " \u200d"],
    )
    assert shown == ["a⟨00AD⟩b⟨FFF9⟩", "⟨E0041⟩", "👨\u200d👩", "می\u200cخواهم", " ⟨200D⟩"]
    assert page.evaluate("visible('a' + String.fromCharCode(0xdcff) + 'b\\n')") == "a⟨DCFF⟩b\n"


def test_values_of_tokens_are_those_of_the_columns(opened, html):
    page = opened(html, "#rollouts?row=g0000-00002")
    wait_for_tokens(page)
    mean = page.evaluate(
        "view.shown.tokens.columns.rkl.reduce((sum, one) => sum + one, 0) / view.shown.row.tokens"
    )
    assert mean == pytest.approx(page.evaluate("view.shown.row.rkl"), rel=0.02)


def test_answers_are_side_by_side_with_differences_marked(opened, html):
    page = opened(html, "#answers")
    assert page.locator(".answer").count() == 16
    card = page.locator(".answer").first
    assert card.locator("mark.gone").all_inner_texts() == ["26", "26", "74", "74."]
    page.get_by_role("button", name=re.compile("solved only after")).click()
    assert page.locator(".answer").count() == 8


@pytest.mark.parametrize("view", ["#overview", "#rollouts", "#answers", "#help"])
def test_a_phone_scrolls_downwards_only(opened, html, view):
    page = opened(html, view, PHONE, has_touch=True)
    page.wait_for_selector("#main > *")
    assert fits(page)
    if view == "#rollouts":
        page.locator(".row").first.click()
        wait_for_tokens(page).nth(3).click()
        page.wait_for_selector(".inspected")
        assert fits(page)
        page.keyboard.press("Escape")
        page.get_by_role("button", name="← List").click()
        assert page.locator(".list").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("view", ["#overview", "#rollouts?row=g0000-00002&token=3", "#answers", "#help"])
def test_text_is_at_least_12_pixels_and_has_contrast(opened, html, view, scheme):
    page = opened(html, view, color_scheme=scheme)
    page.wait_for_timeout(500)
    assert page.evaluate(SMALL) == []
    assert page.evaluate(FAINT) == []


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE])
@pytest.mark.parametrize("view", ["#overview", "#rollouts", "#answers"])
def test_long_words_do_not_widen_the_page(opened, tmp_path, view, viewport):
    long = "W" * 3000
    run = viewer_samples.run() | {"headline": long, "verdict": long, "about": long, "name": "x" * 200}
    run |= {"warnings": [{"step": 1, "text": long}], "provenance": [{"label": "command", "value": long}]}
    run["answers"][0]["after"]["text"] = long
    (tmp_path / "long.html").write_text(
        assembling.render(viewer_samples.document(run, run | {"name": "y" * 200}))
    )
    page = opened(tmp_path / "long.html", view, viewport)
    page.wait_for_timeout(300)
    assert fits(page)


def test_a_failure_is_told(opened, tmp_path):
    run = viewer_samples.run()
    run["rollouts"]["columns"]["token"]["data"] = run["rollouts"]["columns"]["token"]["data"][:400]
    (tmp_path / "cut.html").write_text(assembling.render(viewer_samples.document(run)))
    page = opened(tmp_path / "cut.html", "#rollouts")
    expect(page.get_by_role("alert")).to_contain_text(
        "data are damaged: they cannot be unpacked. Reload the page"
    )


def test_a_run_with_next_to_nothing_still_opens(opened, tmp_path):
    run: dict[str, Any] = {
        "name": "new",
        "kind": "run",
        "headline": "Not trained yet",
        "verdict": "Not trained yet.",
        "rollouts": None,
        "table": [],
        "curves": [],
    }
    (tmp_path / "bare.html").write_text(assembling.render(viewer_samples.document(run)))
    page = opened(tmp_path / "bare.html")
    assert page.locator("h1").inner_text() == "Not trained yet"
    assert page.locator(".verdict").count() == 0
    page.keyboard.press("r")
    assert "no rollouts" in page.locator(".empty").inner_text()


def test_the_theme_is_switched(opened, html):
    page = opened(html, color_scheme="light")
    page.keyboard.press("t")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 19, 23)"


def test_it_prints(opened, html):
    page = opened(html)
    page.wait_for_selector(".u-over")
    printed = page.pdf(format="A4", print_background=True)
    assert printed.startswith(b"%PDF")
    page.emulate_media(media="print")
    assert page.locator(".top").is_hidden()
    assert page.locator("h1").is_visible()
    assert page.locator("rect.bar").first.is_visible()
    page.evaluate("go({ view: 'rollouts' })")
    wait_for_tokens(page)
    assert page.get_by_label("Colour the tokens by").is_visible()


def test_a_served_cache_has_strips_and_other_texts_of_the_prompt(browser, tmp_path):
    root = write_cache(tmp_path / "cache", 120)
    source = view.source(str(root))
    html = assembling.render(gather.page_data([source], 20, serve=True))
    with serve.Server(html, [serve.Rows(source, pytest.fail)], 0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page, seen = browser.new_page(viewport=DESKTOP), []
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.goto(f"{server.address}#rollouts")
        wait_for_tokens(page)
        expect(page.locator(".count")).to_have_text("120 rollouts")
        assert page.locator(".row").count() == page.locator(".heat-strip").count() > 5
        page.evaluate("view.list.select(49)")
        page.keyboard.press("j")  # a row that was not asked for yet
        expect(page.locator("#row-50")).to_have_attribute("aria-selected", "true")
        expect(page.locator("code.id")).to_have_attribute("title", page.evaluate("view.rows[50].id"))
        page.evaluate("view.list.node.scrollTop = 100 * ROW_HEIGHT")
        expect(page.locator("#row-101 .heat-strip")).to_have_count(1)
        page.get_by_label("Colour the tokens by").select_option("teacher_entropy")
        expect(page.locator("#row-101 .heat-strip")).to_have_count(1)
        page.locator("#row-101").click()
        expect(page.locator("#row-101")).to_have_attribute("aria-selected", "true")
        wanted = page.evaluate("view.rows[101].id")
        expect(page.locator("code.id")).to_have_attribute("title", wanted)
        prompt = page.evaluate("view.shown.row.prompt_id")
        same = page.evaluate("(prompt) => asked('rows', {run: 0, prompt})", prompt)["total"]
        assert same > 1
        expect(page.locator("#others .other")).to_have_count(min(same, 13) - 1)
        page.get_by_role("button", name="Only this prompt").click()
        expect(page.locator(".count")).to_have_text(f"{same} of 120 rollouts")
        server.shutdown()
    page.close()
    assert seen == []


def test_200_rollouts_of_512_tokens_are_small_and_smooth(opened, tmp_path):
    path = tmp_path / "large.html"
    path.write_text(assembling.render(viewer_samples.document(viewer_samples.run(rows=200, length=512))))
    assert path.stat().st_size < 3e6
    page = opened(path)
    paint = page.evaluate(
        "performance.getEntriesByName('first-contentful-paint')[0]?.startTime ?? performance.now()"
    )
    assert paint < 1500
    began = time.monotonic()
    page.keyboard.press("r")
    wait_for_tokens(page)
    assert time.monotonic() - began < 3
    assert page.locator(".row").count() < 40
    frames = page.evaluate(SCROLL)
    assert sorted(frames)[len(frames) // 2] < 34  # median; this machine draws in software
    assert page.locator(".row").count() < 40


SCROLL = """async () => {
  const list = document.querySelector(".list"), frames = [];
  let last = performance.now();
  for (let i = 0; i < 60; i++) {
    list.scrollTop += 90;
    await new Promise(requestAnimationFrame);
    frames.push(performance.now() - last);
    last = performance.now();
  }
  return frames;
}"""
TEXTS = """const texts = [...document.querySelectorAll("body *")].filter((node) =>
    node.checkVisibility() && !node.closest(".unseen, script, .skip")
    && [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim()));"""
SMALL = f"""() => {{ {TEXTS}
  return texts.filter((node) => parseFloat(getComputedStyle(node).fontSize) < 12)
    .map((node) => node.outerHTML.slice(0, 100)); }}"""
FAINT = f"""() => {{ {TEXTS}
  const canvas = document.createElement("canvas").getContext("2d", {{ willReadFrequently: true }});
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const drawn = (colours) => {{
    colours.forEach((colour) => {{ canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }});
    return [...canvas.getImageData(0, 0, 1, 1).data];
  }};
  return texts.filter((node) => {{
    const under = [];
    for (let at = node; at; at = at.parentElement) under.unshift(getComputedStyle(at).backgroundColor);
    const paper = getComputedStyle(document.body).backgroundColor;
    const [back, ink] = [[], [getComputedStyle(node).color]].map((own) => light(drawn([paper, ...under, ...own])));
    const [a, b] = [back, ink].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }}).map((node) => node.outerHTML.slice(0, 160));
}}"""
