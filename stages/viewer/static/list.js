"use strict";
// A list of any length, of which only the rows in view are in the page.

class List {
  // draw(i) returns the content of row i; chosen(i) is told of a click.
  constructor({ label, height, draw, chosen }) {
    Object.assign(this, { height, draw, chosen, count: 0, at: -1, nodes: new Map() });
    this.space = el("div", { class: "space" });
    this.node = el("div", { class: "list", role: "listbox", tabindex: 0, "aria-label": label }, this.space);
    this.node.addEventListener("scroll", () => this.refresh(), { passive: true });
    this.node.addEventListener("click", (event) => {
      const row = event.target.closest(".row");
      if (row) this.chosen(Number(row.dataset.place));
    });
    new ResizeObserver(() => this.refresh()).observe(this.node);
  }

  fill(count) {
    this.count = count;
    this.space.style.height = count * this.height + "px";
    this.clear();
  }

  clear() {
    for (const node of this.nodes.values()) node.remove();
    this.nodes.clear();
    this.refresh();
  }

  refresh() {
    const first = Math.max(0, Math.floor(this.node.scrollTop / this.height) - 4);
    const end = Math.min(
      this.count,
      Math.ceil((this.node.scrollTop + this.node.clientHeight) / this.height) + 4,
    );
    for (const [place, node] of this.nodes) {
      if (place >= first && place < end) continue;
      node.remove();
      this.nodes.delete(place);
    }
    for (let place = first; place < end; place++) if (!this.nodes.has(place)) this.add(place);
  }

  add(place) {
    const node = el(
      "div",
      {
        class: "row",
        role: "option",
        id: "row-" + place,
        "data-place": place,
        "aria-posinset": place + 1,
        "aria-setsize": this.count,
        "aria-selected": String(place === this.at),
        styles: { transform: `translateY(${place * this.height}px)`, height: this.height + "px" },
      },
      this.draw(place),
    );
    this.nodes.set(place, node);
    this.space.append(node);
  }

  select(place) {
    this.nodes.get(this.at)?.setAttribute("aria-selected", "false");
    this.at = place;
    if (place < 0) return this.node.removeAttribute("aria-activedescendant");
    const top = place * this.height;
    if (top < this.node.scrollTop) this.node.scrollTop = top;
    else if (top + this.height > this.node.scrollTop + this.node.clientHeight)
      this.node.scrollTop = top + this.height - this.node.clientHeight;
    this.refresh();
    this.nodes.get(place)?.setAttribute("aria-selected", "true");
    this.node.setAttribute("aria-activedescendant", "row-" + place);
  }
}
