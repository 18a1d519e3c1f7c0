"""The page in a real browser: it opens clean, folds, searches, filters, shows details, and stays usable when large."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import timm
import torch
from torch import nn

from graphopt.compiler.triggers import AtEpoch
from graphopt.diff import Diff
from graphopt.diff.phases import phase_diffs
from graphopt.diff.render.page import to_html
from tests.diff.passes import Blend, Ice, Part, Say
from tests.diff.plans import Copy, plan
from tests.support.backbones import Small

pytestmark = pytest.mark.browser
EVIL = "</script><img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of everything: frozen, shared, a local module with a head, and a name that wants to be code."""
    path = tmp_path_factory.mktemp("page") / "small.html"
    evil = Say(select="fc", status="frozen", detail={"why": EVIL})
    passes = [Ice(select=("stem", "blocks.0")), Blend(select="blocks.1"), Part(select="blocks.3"), evil]
    path.write_text(to_html(Diff.of(plan(*passes, model=Small(blocks=6), costs=False))))
    return path


@pytest.fixture(scope="module")
def phases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three phases: nothing, the front frozen, and one block thawed again."""
    path = tmp_path_factory.mktemp("page") / "phases.html"
    passes = [Ice(select=("stem", "blocks.0", "blocks.1"), when=AtEpoch(epoch=2)), Ice(select="blocks.2", when=AtEpoch(epoch=3, until=5))]
    path.write_text(to_html(phase_diffs(plan(*passes), epochs=8)))
    return path


def card(page: Any, name: str) -> Any:
    return page.locator(f'[data-id="{name}"]')


def test_it_opens_and_shows_blocks_from_input_to_output(browse: Any, small: Path) -> None:
    page = browse(small)
    names = page.locator("[data-id] .name").all_text_contents()
    assert names == ["stem", "blocks.0", "blocks.1", "blocks.2-3 ×2", "aux.0", "blocks.4-5 ×2", "head"]
    assert page.locator(".arc").count() == 2
    assert page.locator(".box.local").count() >= 2
    assert "backward stops" in page.locator(".layer-marks").text_content()
    assert "no gradient" in page.locator(".layer-marks").text_content()


def test_names_are_text_and_never_code(browse: Any, small: Path) -> None:
    page = browse(small)
    card(page, "r:head").click()
    assert EVIL in page.locator("aside").text_content()
    assert page.locator("aside img").count() == 0
    assert page.title() == "Small → rewritten"


def test_a_group_unfolds_and_folds_back(browse: Any, small: Path) -> None:
    page = browse(small)
    page.locator('[data-fold="f:blocks.4"]').click()
    assert card(page, "r:blocks.4").count() == card(page, "r:blocks.5").count() == 1
    card(page, "r:blocks.4").focus()
    page.keyboard.press("Backspace")
    assert card(page, "f:blocks.4").count() == 1


def test_a_block_opens_to_its_operations(browse: Any, small: Path) -> None:
    page = browse(small)
    page.locator('[data-fold="r:blocks.1"]').click()
    assert page.locator('[data-id="r:blocks.1"] .op').count() >= 12
    assert page.locator('[data-id="r:blocks.1"] .op.s-inserted').count() == 12
    page.locator('[data-fold="r:blocks.1"]').click()
    assert page.locator(".op").count() == 0


def test_stages_shut_and_open(browse: Any, small: Path) -> None:
    page = browse(small)
    page.get_by_role("button", name="Stages").click()
    assert page.locator('[data-id^="g:"]').count() == 2
    page.get_by_role("button", name="Folded").click()
    page.locator("[data-group]").first.click()
    assert page.locator('[data-id^="g:"]').count() == 1
    page.locator('[data-id^="g:"] [data-fold]').click()
    assert page.locator('[data-id^="g:"]').count() == 0


def test_search_finds_blocks_and_operations(browse: Any, small: Path) -> None:
    page = browse(small)
    page.keyboard.press("/")
    page.keyboard.type("blocks.3")
    assert page.locator(".hit-by-search").count() == 1
    assert page.locator(".found").text_content() == "1 block found"
    page.keyboard.press("Enter")
    assert "blocks.3" in page.locator("aside h2").text_content()
    page.locator("input[type=search]").fill("linear")
    labels = page.eval_on_selector_all(".hit-by-search", "l => l.map(e => e.getAttribute('aria-label'))")
    assert {label.split(",")[0] for label in labels} == {"head", "aux.0"}
    page.locator("input[type=search]").fill("no such thing")
    assert page.locator(".found").text_content() == "nothing found"


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven phases of many blocks: more than a window is wide."""
    path = tmp_path_factory.mktemp("page") / "long.html"
    model = Small(blocks=0)
    model.blocks.extend(nn.Conv2d(8, 8, 1) for _ in range(60))
    passes = [Ice(select=f"blocks.{n}", when=AtEpoch(epoch=n)) for n in range(1, 7)]
    path.write_text(to_html(phase_diffs(plan(*passes, model=model, costs=False), epochs=8)))
    return path


@pytest.mark.parametrize("width", [1280, 390])
def test_the_strip_of_a_phase_stays_in_its_card_and_the_shown_one_in_the_window(browse: Any, width: int, long: Path) -> None:
    page = browse(long, width=width)
    boxes = "[...document.querySelectorAll('.phases button')].map(b => [b, ...b.querySelectorAll('i')].map(e => e.getBoundingClientRect()))"
    for card, *bars in page.evaluate(f"{boxes}.map(l => l.map(r => [r.left, r.right]))"):
        assert len(bars) == 62
        assert all(card[0] <= left <= right <= card[1] for left, right in bars)
    shown = page.evaluate("(r => [r.left, r.right])(document.querySelector('.phases [aria-pressed=true]').getBoundingClientRect())")
    assert 0 <= shown[0] <= shown[1] <= width


def test_filters_dim_what_is_not_asked_for(browse: Any, small: Path) -> None:
    page = browse(small)
    page.locator('[data-status="shared"]').click()
    assert page.locator(".piece:not(.dim)").count() == 1
    page.locator('[data-status="frozen"]').click()
    assert page.locator(".piece:not(.dim)").count() == 4
    page.keyboard.press("Escape")
    assert page.locator(".piece.dim").count() == 0


def test_click_shows_shapes_pass_and_reason(browse: Any, small: Path) -> None:
    page = browse(small)
    card(page, "r:stem").click()
    details = page.locator("aside").text_content()
    for word in ("stem", "frozen", "N × 3 × 8 × 8", "ice, pass 1", 'select = ["stem", "blocks.0"]', "cold <b>here</b>", "224"):
        assert word in details.replace('[\n    "stem",\n    "blocks.0",\n]', '["stem", "blocks.0"]')
    page.keyboard.press("Escape")
    assert not page.locator("aside").is_visible()


def test_the_keyboard_is_enough(browse: Any, small: Path) -> None:
    page = browse(small)
    card(page, "r:stem").focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    focused = "document.activeElement.getAttribute('data-id')"
    assert page.evaluate(focused) == "r:blocks.1"
    page.keyboard.press("Enter")
    assert "blocks.1" in page.locator("aside h2").text_content()
    page.keyboard.press(" ")
    assert page.locator(".op").count() > 0
    before = page.locator(".stage").get_attribute("transform")
    page.keyboard.press("+")
    assert page.locator(".stage").get_attribute("transform") != before


def test_zoom_and_pan_with_the_mouse(browse: Any, small: Path) -> None:
    page = browse(small)
    at = lambda: page.locator(".stage").get_attribute("transform")  # noqa: E731
    start = at()
    page.mouse.move(640, 700)
    page.mouse.wheel(0, 120)
    panned = at()
    page.mouse.down()
    page.mouse.move(500, 500, steps=4)
    page.mouse.up()
    dragged = at()
    page.keyboard.down("Control")
    page.mouse.wheel(0, -200)
    page.keyboard.up("Control")
    page.wait_for_timeout(50)
    assert len({start, panned, dragged, at()}) == 4
    page.get_by_role("button", name="Fit").click()
    assert at() == start


def test_phases_move_only_what_changes(browse: Any, phases: Path) -> None:
    page = browse(phases)
    buttons = page.locator(".phases button")
    assert buttons.count() == 4
    places = "l => l.map(e => [e.getAttribute('data-id'), e.style.transform])"
    buttons.nth(0).click()
    first = page.eval_on_selector_all("[data-id]", places)
    assert page.locator(".s-frozen.piece").count() == 0
    buttons.nth(1).click()
    assert page.eval_on_selector_all("[data-id]", places) == first
    assert page.locator(".s-frozen.piece").count() == 2  # the stem, and two blocks folded
    page.keyboard.press("]")
    assert page.locator(".s-frozen.piece").count() == 3
    assert page.locator(".phases [aria-pressed=true]").text_content().startswith("epoch 3")


@pytest.mark.parametrize(("width", "height", "dark"), [(1280, 800, False), (390, 844, True)])
def test_nothing_overlaps_and_nothing_sticks_out(browse: Any, small: Path, width: int, height: int, dark: bool) -> None:
    page = browse(small, width=width, height=height, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    corners = "l => l.map(e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; })"
    boxes = page.eval_on_selector_all("[data-id] > .card", corners)
    for i, a in enumerate(boxes):
        assert 0 <= a[0] < a[2] <= width
        for b in boxes[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    inside = """l => l.flatMap(card => { const c = card.querySelector('.card').getBoundingClientRect();
        const out = (t) => { const r = t.getBoundingClientRect(); return r.right > c.right + 1 || r.left < c.left - 1; };
        return [...card.querySelectorAll('text')].filter(out).map(t => t.textContent); })"""
    assert page.eval_on_selector_all("[data-id]", inside) == []
    # The labels' widths are estimates that must hold for the widest fonts too (DejaVu Sans, where nothing else is installed).
    beyond = """l => l.filter(g => g.querySelector('rect')).flatMap(g => {
        const c = g.querySelector('rect').getBoundingClientRect();
        const out = (t) => { const r = t.getBoundingClientRect(); return r.right > c.right + 1 || r.bottom > c.bottom + 1; };
        return [...g.querySelectorAll('text')].filter(out).map(t => t.textContent); })"""
    assert page.locator(".mark").count() >= 1
    assert page.locator(".end").count() == 2
    assert page.eval_on_selector_all(".mark, .end", beyond) == []
    heights = page.eval_on_selector_all(".piece .name", "l => l.map(e => e.getBoundingClientRect().height)")
    assert min(heights) >= 9


def test_light_and_dark(browse: Any, small: Path) -> None:
    page = browse(small)
    ground = lambda: page.evaluate("getComputedStyle(document.body).backgroundColor")  # noqa: E731
    light = ground()
    page.get_by_role("button", name="Light or dark").click()
    assert ground() != light
    assert page.evaluate("getComputedStyle(document.querySelector('.piece .name')).fill") != "rgb(27, 31, 36)"


def test_a_block_is_found_under_both_of_its_names(browse: Any, tmp_path: Path) -> None:
    path = tmp_path / "two.html"
    path.write_text(to_html(Diff.of(plan(), plan(model=Copy()))))
    page = browse(path)
    page.get_by_role("button", name="Blocks", exact=True).click()
    page.locator("input[type=search]").fill("blocks.1")
    assert page.locator(".hit-by-search .name").all_text_contents() == ["body.1"]
    page.locator("input[type=search]").fill("")
    card(page, "r:body.1").click()
    assert "in the first of the two: blocks.1" in page.locator("aside").text_content()


def test_the_picture_is_saved_as_it_is_shown(browse: Any, small: Path, tmp_path: Path) -> None:
    page = browse(small)
    page.get_by_role("button", name="Blocks", exact=True).click()
    found = {}
    for kind in ("SVG", "PNG"):
        with page.expect_download() as waiting:
            page.get_by_role("button", name=kind, exact=True).click()
        assert waiting.value.suggested_filename == f"Small-rewritten.{kind.lower()}"
        waiting.value.save_as(tmp_path / kind)
        found[kind] = (tmp_path / kind).read_bytes()
    names = [e.text for e in ElementTree.fromstring(found["SVG"]).iter("{http://www.w3.org/2000/svg}text") if e.get("class") == "name"]
    assert "blocks.3" in names
    assert b"var(" not in found["SVG"]
    assert found["PNG"].startswith(b"\x89PNG\r\n")


def test_an_operation_has_the_colour_of_its_own_status(browse: Any, small: Path) -> None:
    page = browse(small)
    page.get_by_role("button", name="Operations").click()
    colour = "e => getComputedStyle(e).fill"
    inside = page.locator(".piece.s-frozen .op.s-unchanged > .sign").first
    assert inside.evaluate(colour) == "rgb(122, 127, 135)", "not that of the block around it"


@pytest.mark.slow
def test_a_large_graph_opens_soon_and_stays_usable(browse: Any, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = timm.create_model("swin_large_patch4_window7_224", num_classes=10)
    found = Diff.of(plan(Ice(select=("patch_embed", "layers.0", "layers.1")), model=model, input=(3, 224, 224)))
    assert sum(len(r.nodes) for r in found.rows) > 1300
    path = tmp_path / "large.html"
    path.write_text(to_html(found))
    page = browse(path)
    # Opening is quick because little is drawn (0.9 s on two busy cores; a test that took the time would fail on a busy machine).
    assert page.locator("[data-id]").count() < 20
    assert page.evaluate("document.querySelectorAll('main svg *').length") < 600
    page.locator("input[type=search]").fill("layers.2.blocks.17")
    assert page.locator(".hit-by-search").count() == 1
    page.get_by_role("button", name="Blocks", exact=True).click()
    assert page.locator("[data-id]").count() == len(found.rows)
    page.get_by_role("button", name="Operations").click()
    page.wait_for_function("document.querySelectorAll('.op').length > 1000")
