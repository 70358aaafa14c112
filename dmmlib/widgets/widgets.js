// The views of dmmlib.widgets: a virtualised gallery, a scatter with a lasso, histograms of a point, and curves. Python holds the state; a
// view shows it and says what the user did. Only images that are seen are asked for, and each once.

const HEIGHT = 102; // of a tile
const OVERSCAN = 2; // rows drawn above and below those that are seen
const KEPT = 5000; // thumbnails held in memory

const typed = (view, Type) => new Type(view.buffer.slice(view.byteOffset, view.byteOffset + view.byteLength));

const node = (tag, attributes = {}, ...children) => {
  const element = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

// Thumbnails by index, asked for in batches. `ready` is called when more have come.
function thumbnails(model, ready) {
  const kept = new Map();
  const asked = new Set();
  let wanted = new Set();
  let timer = 0;

  function ask() {
    timer = 0;
    const indices = [...wanted].filter((i) => !kept.has(i) && !asked.has(i));
    wanted = new Set();
    if (!indices.length) return;
    indices.forEach((i) => asked.add(i));
    model.send({ kind: "thumbnails", indices });
  }

  function answer(message, buffers) {
    if (message.kind !== "thumbnails") return;
    const [height, width, channels] = model.get("shape");
    const size = height * width;
    const pixels = buffers.length ? typed(buffers[0], Uint8Array) : null;
    message.indices.forEach((index, k) => {
      let image = null;
      if (size && pixels) {
        image = new ImageData(width, height);
        const from = k * size * channels;
        for (let p = 0; p < size; p++) {
          for (let c = 0; c < 3; c++) image.data[4 * p + c] = pixels[from + channels * p + (channels > 1 ? c : 0)];
          image.data[4 * p + 3] = 255;
        }
      }
      asked.delete(index);
      kept.set(index, { image, title: message.titles[k], detail: message.details[k] });
      if (kept.size > KEPT) kept.delete(kept.keys().next().value);
    });
    ready();
  }

  function forget() {
    kept.clear();
    asked.clear();
    ready();
  }

  model.on("msg:custom", answer);
  model.on("change:version", forget);
  return {
    get(index) {
      const found = kept.get(index);
      if (!found) {
        wanted.add(index);
        timer ||= setTimeout(ask, 20);
      }
      return found;
    },
    stop() {
      clearTimeout(timer);
      model.off("msg:custom", answer);
      model.off("change:version", forget);
    },
  };
}

function paint(canvas, image, grey) {
  canvas.classList.toggle("dmm-grey", grey);
  const context = canvas.getContext("2d");
  if (!image) return context.clearRect(0, 0, canvas.width, canvas.height);
  if (canvas.width !== image.width || canvas.height !== image.height) {
    canvas.width = image.width;
    canvas.height = image.height;
  }
  context.putImageData(image, 0, 0);
}

// Keys typed in the widget are the widget's: JupyterLab's own shortcuts (dd deletes a cell) skip marked elements. One
// listener marks whatever comes to have the focus, so it does not matter when a widget is drawn or moved.
const OURS = ".dmm-widget, .dmm-gallery, .dmm-scatter, .dmm-histograms, .dmm-curves";
document.dmmGuard ??= document.addEventListener(
  "focusin",
  (event) => event.target.closest?.(OURS) && (event.target.dataset.lmSuppressShortcuts = "true"),
  true,
) ?? true;

// Call `ready` once with the widget that a view is part of, or with the view; which may come to its place late.
function placed(el, ready) {
  const seen = new ResizeObserver(() => {
    if (!el.isConnected) return;
    seen.disconnect();
    ready(el.closest(".dmm-widget") ?? el);
  });
  seen.observe(el);
  return () => seen.disconnect();
}

// ipywidgets leaves the handles of its sliders without a name for screen readers, whenever it comes to draw them.
function nameHandles(root) {
  const name = () => {
    for (const handle of root.querySelectorAll(".noUi-handle:not([aria-label])")) {
      const slider = handle.closest(".widget-hslider");
      const label = slider?.querySelector(".widget-label")?.textContent;
      const which = handle.classList.contains("noUi-handle-lower") ? ": lowest" : ": highest";
      const one = slider?.querySelectorAll(".noUi-handle").length === 1;
      if (label) handle.setAttribute("aria-label", label + (one ? "" : which));
    }
  };
  const drawn = new MutationObserver(name);
  name();
  drawn.observe(root, { childList: true, subtree: true });
  return () => drawn.disconnect();
}

// Lists that are dropped on the widget are read here; of folders and of other files only the names are sent.
const LISTS = /\.(json|csv|tsv|txt)$/i;
function acceptDrops(model, root) {
  const over = (event) => {
    if (![...event.dataTransfer.types].includes("Files")) return;
    event.preventDefault();
    event.stopPropagation();
    root.classList.toggle("dmm-dropping", event.type === "dragover");
  };
  const names = async (entry) => {
    if (entry.isFile) return [entry.fullPath.slice(1)];
    const reader = entry.createReader();
    const found = [];
    for (;;) {
      const more = await new Promise((done, failed) => reader.readEntries(done, failed));
      if (!more.length) return found;
      for (const inner of more) found.push(...(await names(inner)));
    }
  };
  const drop = async (event) => {
    over(event);
    const files = [...event.dataTransfer.files];
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const others = [];
    for (const file of files.filter((f) => LISTS.test(f.name))) {
      model.send({ kind: "dropped", name: file.name, text: await file.text() });
    }
    for (const entry of entries.filter((e) => !LISTS.test(e.name))) others.push(...(await names(entry)));
    if (!entries.length) others.push(...files.map((f) => f.name).filter((name) => !LISTS.test(name)));
    if (!others.length) return;
    const name = others.length === 1 ? others[0] : `What was dropped (${others.length} files)`;
    model.send({ kind: "dropped", name, text: JSON.stringify({ ids: others }) });
  };
  const handlers = { dragover: over, dragleave: over, drop };
  Object.entries(handlers).forEach(([event, handler]) => root.addEventListener(event, handler));
  return () => Object.entries(handlers).forEach(([event, handler]) => root.removeEventListener(event, handler));
}

// A sentence once the kernel has gone, with what was chosen, if a widget chooses, so that it can be pasted into a new one.
function watchKernel(model, el, chosen) {
  const notice = node("div", { class: "dmm-notice", role: "alert" });
  const check = () =>
    setTimeout(() => {
      const root = el.closest(".dmm-widget") ?? el;
      notice.remove();
      const first = root === el || root.querySelector(".dmm-gallery, .dmm-curves") === el; // one sentence a widget
      if (!first || !el.closest(".jupyter-widgets-disconnected")) return;
      const indices = chosen?.() ?? [];
      notice.textContent =
        "The kernel behind this widget has stopped; run its cell again." +
        (chosen ? " Saved forget sets are kept on disk." : "") +
        (indices.length ? ` Chosen here, to paste there: ${indices.join(", ")}` : "");
      root.prepend(notice);
    });
  model.on("comm_live_update", check);
  return () => model.off("comm_live_update", check);
}

// "undo" and "redo" for the keys that mean it.
function history(event) {
  if (!event.ctrlKey && !event.metaKey) return "";
  const key = event.key.toLowerCase();
  return key === "y" || (key === "z" && event.shiftKey) ? "redo" : key === "z" ? "undo" : "";
}
const chosenIndices = (mask) => [...mask.keys()].filter((i) => mask[i]);

// --- gallery ---------------------------------------------------------------------------------------------------

function gallery({ model, el }) {
  const id = `dmm-${Math.random().toString(36).slice(2)}`;
  const spacer = node("div", { class: "dmm-spacer" });
  const viewport = node("div", { class: "dmm-viewport", role: "listbox", tabindex: 0 }, spacer);
  const spoken = node("div", { class: "dmm-spoken", role: "status" }); // for screen readers
  el.classList.add("dmm-gallery");
  el.append(viewport, spoken);

  let order, chosen;
  let columns = 1;
  let width = 0; // of a tile
  const tiles = new Map(); // position in the order -> element
  const images = thumbnails(model, draw);
  const selectable = model.get("selectable");
  viewport.setAttribute("aria-multiselectable", selectable);

  function tile(position) {
    const canvas = node("canvas", { width: 28, height: 28, "aria-hidden": true });
    const element = node(
      "div",
      { class: "dmm-tile", role: "option", id: `${id}-${position}`, "aria-setsize": order.length },
      canvas,
      node("span", { class: "dmm-title" }),
      node("span", { class: "dmm-detail" }),
    );
    element.setAttribute("aria-posinset", position + 1);
    element.style.left = `${(position % columns) * width}px`;
    element.style.width = `${width - 4}px`;
    element.style.top = `${Math.floor(position / columns) * HEIGHT}px`;
    element.addEventListener("click", (event) => {
      const from = order.indexOf(model.get("focus"));
      focus(order[position]);
      if (!selectable) return;
      if (!event.shiftKey) toggle(order[position]);
      else if (from >= 0) take(order.slice(Math.min(from, position), Math.max(from, position) + 1));
    });
    element.addEventListener("mousedown", (event) => event.shiftKey && event.preventDefault()); // selects no text
    spacer.append(element);
    return element;
  }

  function show(element, index, found, isCurrent, isChosen) {
    const [title, detail] = found ? [found.title, found.detail] : ["", `#${index}`];
    const [canvas, head, foot] = element.children;
    paint(canvas, found?.image, model.get("shape")[2] === 1);
    head.textContent = title;
    foot.textContent = detail;
    element.title = `${title} ${detail}`;
    element.dataset.index = index;
    element.classList.toggle("dmm-loading", !found);
    element.classList.toggle("dmm-current", isCurrent);
    element.classList.toggle("dmm-chosen", isChosen);
    element.setAttribute("aria-selected", isChosen);
    element.setAttribute("aria-label", `${title}, ${detail}${isChosen ? ", to be forgotten" : ""}`);
  }

  function draw() {
    const first = Math.max(0, Math.floor(viewport.scrollTop / HEIGHT) - OVERSCAN) * columns;
    const seen = Math.ceil(viewport.clientHeight / HEIGHT) + 2 * OVERSCAN;
    const last = Math.min(order.length, first + seen * columns);
    for (const [position, element] of tiles) {
      if (position < first || position >= last) {
        element.remove();
        tiles.delete(position);
      }
    }
    const current = model.get("focus");
    viewport.removeAttribute("aria-activedescendant");
    for (let position = first; position < last; position++) {
      if (!tiles.has(position)) tiles.set(position, tile(position));
      const element = tiles.get(position);
      const index = order[position];
      const found = images.get(index);
      const state = [found, index === current, !!chosen[index]];
      if (!element.state?.every((value, k) => value === state[k])) show(element, index, ...state);
      element.state = state;
      if (index === current) viewport.setAttribute("aria-activedescendant", element.id);
    }
  }

  function layout() {
    columns = Math.max(1, Math.floor(viewport.clientWidth / model.get("width")));
    width = viewport.clientWidth / columns;
    spacer.style.height = `${Math.ceil(order.length / columns) * HEIGHT}px`;
    spacer.dataset.empty = order.length ? "" : model.get("empty");
    tiles.forEach((element) => element.remove());
    tiles.clear();
    draw();
  }

  function reorder() {
    order = typed(model.get("order"), Int32Array);
    viewport.scrollTop = 0;
    layout();
  }

  function mark() {
    chosen = typed(model.get("chosen"), Uint8Array);
    if (selectable) spoken.textContent = `${chosenIndices(chosen).length} images to be forgotten`;
    draw();
  }

  function focus(index) {
    if (index !== model.get("focus")) el.dispatchEvent(new Event("dmm-focus", { bubbles: true }));
    model.set("focus", index);
    model.save_changes();
  }

  // Consequences shown beside a choice that they are not of: said from the first click until Python has new ones.
  function outdated(now) {
    const root = el.closest(".dmm-widget");
    root?.classList.toggle("dmm-outdated", now);
    root?.querySelector(".dmm-consequences")?.setAttribute("aria-busy", now);
  }

  function toggle(index) {
    if (index < chosen.length) {
      chosen[index] ^= 1; // shown at once; Python's answer follows
      outdated(true);
    }
    draw();
    model.send({ kind: "toggle", index });
  }

  function take(points) {
    const indices = [...points].filter((index) => index < chosen.length);
    if (indices.some((index) => !chosen[index])) outdated(true);
    indices.forEach((index) => (chosen[index] = 1));
    draw();
    model.send({ kind: "take", indices });
  }

  function reveal() {
    const row = Math.floor(Math.max(0, order.indexOf(model.get("focus"))) / columns);
    const top = row * HEIGHT;
    const bottom = top + HEIGHT;
    if (top < viewport.scrollTop) viewport.scrollTop = top;
    else if (bottom > viewport.scrollTop + viewport.clientHeight) viewport.scrollTop = bottom - viewport.clientHeight;
  }

  viewport.addEventListener("scroll", draw, { passive: true });
  viewport.addEventListener("keydown", (event) => {
    if (!order.length) return;
    const page = Math.max(1, Math.floor(viewport.clientHeight / HEIGHT)) * columns;
    const steps = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns,
      PageUp: -page, PageDown: page, Home: -order.length, End: order.length,
    };
    const at = order.indexOf(model.get("focus"));
    if (event.key in steps) {
      const to = at < 0 ? 0 : Math.min(order.length - 1, Math.max(0, at + steps[event.key]));
      focus(order[to]);
      reveal();
      draw();
    } else if ((event.key === " " || event.key === "Enter") && at >= 0) {
      if (selectable) toggle(order[at]);
    } else if (selectable && event.key.toLowerCase() === "a" && (event.ctrlKey || event.metaKey)) {
      take(order);
    } else if (history(event)) {
      model.send({ kind: history(event) });
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  const name = () => viewport.setAttribute("aria-label", model.get("label"));

  const handlers = { "change:order": reorder, "change:chosen": mark, "change:focus": draw, "change:label": name };
  Object.entries(handlers).forEach(([event, handler]) => model.on(event, handler));
  // The preview is asked for once the user pauses, so that quick clicks do not queue up.
  let pause = 0;
  const settle = () => {
    clearTimeout(pause);
    pause = setTimeout(() => model.send({ kind: "settled" }), 30);
  };
  const judge = () => outdated(model.get("outdated"));
  if (selectable) {
    model.on("change:chosen", settle);
    model.on("change:outdated", judge);
  }
  const undo = [
    placed(el, (root) => {
      if (!selectable) return;
      judge();
      undo.push(nameHandles(root), acceptDrops(model, root));
    }),
  ];
  const unwatch = watchKernel(model, el, () => (selectable ? chosenIndices(chosen) : []));

  const resized = new ResizeObserver(layout);
  viewport.style.height = `${model.get("rows") * HEIGHT}px`;
  order = typed(model.get("order"), Int32Array);
  chosen = typed(model.get("chosen"), Uint8Array);
  name();
  resized.observe(viewport);
  return () => {
    resized.disconnect();
    clearTimeout(pause);
    images.stop();
    undo.forEach((off) => off());
    unwatch();
    Object.entries(handlers).forEach(([event, handler]) => model.off(event, handler));
    model.off("change:chosen", settle);
    model.off("change:outdated", judge);
  };
}

// --- scatter ---------------------------------------------------------------------------------------------------

function scatter({ model, el }) {
  const MARGIN = { left: 14, right: 14, top: 12, bottom: 26 };
  const WHOLE = { x: 0, y: 0, zoom: 1 }; // the corner of what is seen, and how many times larger it is drawn
  const canvas = node("canvas", { class: "dmm-plane", tabindex: 0, role: "img" });
  const tip = node("div", { class: "dmm-tip", hidden: "" }, node("canvas"), node("span"));
  const legend = node("div", { class: "dmm-legend" });
  el.classList.add("dmm-scatter");
  const zooms = [["+", "Zoom in", 1.5], ["−", "Zoom out", 1 / 1.5], ["⤢", "Show all", 0]].map(([sign, name, by]) => {
    const button = node("button", { type: "button", title: name, "aria-label": name }, sign);
    button.addEventListener("click", () => zoom(by));
    return button;
  });
  el.append(node("div", { class: "dmm-stage" }, canvas, node("div", { class: "dmm-zooms" }, ...zooms), tip), legend);

  const context = canvas.getContext("2d");
  const images = thumbnails(model, () => hovered >= 0 && point(hovered));
  let xy, groups, shown, chosen;
  let path = []; // the lasso, in pixels
  let hovered = -1;
  let frame = 0;

  let view = WHOLE;
  let moving = null; // where a drag that moves the plane was last

  const plane = () => [canvas.clientWidth - MARGIN.left - MARGIN.right, canvas.clientHeight - MARGIN.top - MARGIN.bottom];
  const place = (i) => [
    MARGIN.left + (xy[2 * i] - view.x) * view.zoom * plane()[0],
    MARGIN.top + (1 - xy[2 * i + 1] - view.y) * view.zoom * plane()[1],
  ];

  function look(x, y, zoom) {
    const last = 1 - 1 / zoom;
    view = { x: Math.min(Math.max(x, 0), last), y: Math.min(Math.max(y, 0), last), zoom };
    point(-1);
    redraw();
  }

  // Zoom by a factor, 0 for all of it, around a point of the canvas that stays where it is.
  function zoom(by, [x, y] = [canvas.clientWidth / 2, canvas.clientHeight / 2]) {
    const zoom = by ? Math.min(Math.max(view.zoom * by, 1), 60) : 1;
    const [across, down] = [(x - MARGIN.left) / plane()[0], (y - MARGIN.top) / plane()[1]];
    look(view.x + across / view.zoom - across / zoom, view.y + down / view.zoom - down / zoom, zoom);
  }

  const move = (dx, dy) => look(view.x - dx / plane()[0] / view.zoom, view.y - dy / plane()[1] / view.zoom, view.zoom);

  function read() {
    xy = typed(model.get("xy"), Float32Array);
    groups = typed(model.get("groups"), Int32Array);
    shown = typed(model.get("shown"), Uint8Array);
    chosen = typed(model.get("chosen"), Uint8Array);
    const counts = new Array(model.get("names").length).fill(0);
    chosen.forEach((on, i) => (counts[groups[i]] += on));
    legend.replaceChildren(
      ...model.get("names").map((name, g) => {
        const dot = node("i", { class: "dmm-dot" });
        dot.style.background = model.get("colours")[g];
        const title = "Show this class alone, or all again";
        const count = model.get("selectable") ? [node("b", {}, String(counts[g]))] : [];
        const item = node("button", { type: "button", title }, dot, name, ...count);
        item.classList.toggle("dmm-none", count.length && !counts[g]);
        item.setAttribute("aria-pressed", model.get("only") === g);
        item.addEventListener("click", () => model.send({ kind: "legend", group: g }));
        return item;
      }),
    );
    canvas.setAttribute("aria-label", model.get("label"));
    redraw();
  }

  function redraw() {
    frame ||= requestAnimationFrame(() => {
      frame = 0;
      draw();
    });
  }

  function draw() {
    const scale = window.devicePixelRatio || 1;
    const [width, height] = [canvas.clientWidth, canvas.clientHeight];
    if (!width) return; // hidden; it is drawn when it has a size again
    canvas.width = width * scale;
    canvas.height = height * scale;
    context.setTransform(scale, 0, 0, scale, 0, 0);
    const style = getComputedStyle(el);
    const ink = style.getPropertyValue("--jp-ui-font-color1") || "black";
    const faint = style.getPropertyValue("--jp-ui-font-color2") || "grey";
    const ground = style.getPropertyValue("--jp-layout-color1") || "white";
    const colours = model.get("colours");
    const disc = (i, radius) => {
      context.beginPath();
      context.arc(...place(i), radius, 0, 2 * Math.PI);
    };
    for (const pass of [0, 1]) {
      for (let i = 0; i < shown.length; i++) {
        if (shown[i] !== pass) continue;
        context.globalAlpha = pass ? 0.65 : 0.18;
        context.fillStyle = pass ? colours[groups[i]] : faint;
        disc(i, pass ? 2.6 : 1.6);
        context.fill();
      }
    }
    context.globalAlpha = 1;
    for (let i = 0; i < chosen.length; i++) {
      if (!chosen[i]) continue;
      context.fillStyle = ink; // which is no class's
      context.strokeStyle = ground;
      context.lineWidth = 1.4;
      disc(i, 5);
      context.fill();
      context.stroke();
    }
    const current = model.get("focus");
    if (current >= 0 && current < shown.length) {
      context.strokeStyle = ink;
      context.lineWidth = 2;
      disc(current, 8);
      context.stroke();
    }
    context.fillStyle = faint;
    context.font = `11px ${style.getPropertyValue("--jp-ui-font-family") || "sans-serif"}`;
    const [across, up] = model.get("axes");
    context.textAlign = "right";
    context.fillText(`${across} →${view.zoom > 1 ? ` ×${view.zoom.toFixed(1)}` : ""}`, width - 6, height - 8);
    context.textAlign = "left";
    context.fillText(`↑ ${up}`, 6, 13);
    if (path.length > 1) {
      context.beginPath();
      path.forEach(([x, y], k) => (k ? context.lineTo(x, y) : context.moveTo(x, y)));
      context.closePath();
      context.globalAlpha = 0.14;
      context.fillStyle = ink;
      context.fill();
      context.globalAlpha = 1;
      context.strokeStyle = ink;
      context.setLineDash([4, 3]);
      context.lineWidth = 1.2;
      context.stroke();
      context.setLineDash([]);
    }
  }

  function inside(x, y) {
    let odd = false;
    for (let a = 0, b = path.length - 1; a < path.length; b = a++) {
      const [[xa, ya], [xb, yb]] = [path[a], path[b]];
      if (ya > y !== yb > y && x < ((xb - xa) * (y - ya)) / (yb - ya) + xa) odd = !odd;
    }
    return odd;
  }

  function nearest(x, y, within) {
    let [best, at] = [within * within, -1];
    for (let i = 0; i < shown.length; i++) {
      if (!shown[i]) continue;
      const [px, py] = place(i);
      const distance = (px - x) ** 2 + (py - y) ** 2;
      if (distance < best) [best, at] = [distance, i];
    }
    return at;
  }

  // What lies under the pointer: the image with its class and index.
  function point(index) {
    hovered = index;
    tip.hidden = index < 0;
    if (index < 0) return;
    const found = images.get(index);
    const [x, y] = place(index);
    paint(tip.children[0], found?.image, model.get("shape")[2] === 1);
    tip.children[1].textContent = found ? `${found.title} ${found.detail}` : `#${index}`;
    tip.style.left = `${Math.min(x + 12, canvas.clientWidth - 110)}px`;
    tip.style.top = `${Math.max(0, Math.min(y - 20, canvas.clientHeight - 100))}px`;
  }

  const position = (event) => {
    const box = canvas.getBoundingClientRect();
    return [event.clientX - box.left, event.clientY - box.top];
  };
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button) return;
    canvas.setPointerCapture(event.pointerId);
    if (event.shiftKey) moving = position(event);
    else path = [position(event)];
    point(-1);
  });
  canvas.addEventListener("pointermove", (event) => {
    const at = position(event);
    if (moving) {
      move(at[0] - moving[0], at[1] - moving[1]);
      moving = at;
    } else if (path.length) {
      path.push(at);
      redraw();
    } else point(nearest(...at, 9));
  });
  canvas.addEventListener("pointerleave", () => point(-1));
  canvas.addEventListener("pointercancel", () => {
    [path, moving] = [[], null];
    redraw();
  });
  canvas.addEventListener("pointerup", (event) => {
    moving = null;
    if (!path.length) return;
    const [xs, ys] = [path.map((p) => p[0]), path.map((p) => p[1])];
    const extent = Math.max(...xs) - Math.min(...xs) + Math.max(...ys) - Math.min(...ys);
    if (extent < 8) {
      const index = nearest(...position(event), 9);
      if (index >= 0) {
        model.set("focus", index);
        model.save_changes();
        model.send({ kind: "toggle", index });
      }
    } else {
      const indices = [...shown.keys()].filter((i) => shown[i] && inside(...place(i)));
      model.send({ kind: "lasso", indices, remove: event.altKey });
    }
    path = [];
    redraw();
  });
  canvas.addEventListener("dblclick", () => zoom(0));
  canvas.addEventListener("wheel", (event) => {
    if (document.activeElement !== canvas && !event.ctrlKey && !event.metaKey) return; // it scrolls the page
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), position(event));
  });
  canvas.addEventListener("keydown", (event) => {
    const moves = { ArrowLeft: [40, 0], ArrowRight: [-40, 0], ArrowUp: [0, 40], ArrowDown: [0, -40] };
    const zooms = { "+": 1.5, "=": 1.5, "-": 1 / 1.5, 0: 0 };
    if (history(event)) model.send({ kind: history(event) });
    else if (event.ctrlKey || event.metaKey) return;
    else if (event.key in moves) move(...moves[event.key]);
    else if (event.key in zooms) zoom(zooms[event.key]);
    else return;
    event.preventDefault();
    event.stopPropagation();
  });

  const events = ["change:xy", "change:shown", "change:chosen", "change:label"];
  events.forEach((event) => model.on(event, read));
  const whole = () => (view = WHOLE);
  model.on("change:axes", whole);
  model.on("change:focus", redraw);
  const resized = new ResizeObserver(redraw);
  resized.observe(canvas);
  const themed = new MutationObserver(redraw);
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-jp-theme-name"] });
  read();
  return () => {
    resized.disconnect();
    themed.disconnect();
    images.stop();
    cancelAnimationFrame(frame);
    events.forEach((event) => model.off(event, read));
    model.off("change:axes", whole);
    model.off("change:focus", redraw);
  };
}

// --- histograms ------------------------------------------------------------------------------------------------

const BINS = 28;
const drawn = (name, attributes = {}, ...children) => {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
};

function histograms({ model, el }) {
  const path = node("div", { class: "dmm-way" });
  const panels = node("div", { class: "dmm-panels" });
  el.classList.add("dmm-histograms");
  el.setAttribute("role", "img");
  const key = "Grey: retrained models. Dashed: originals. In colour: each method, with its KLoM.";
  el.append(path, node("p", { class: "dmm-quiet" }, key), panels);

  function draw() {
    el.setAttribute("aria-label", model.get("label"));
    const all = typed(model.get("values"), Float32Array);
    const groups = [];
    let from = 0;
    for (const count of model.get("counts")) groups.push(all.subarray(from, (from += count)));
    const sorted = Float32Array.from(all).sort();
    const [low, high] = [sorted[Math.floor(0.002 * sorted.length)], sorted[Math.ceil(0.998 * sorted.length) - 1]];
    const bin = (value) => Math.min(BINS - 1, Math.max(0, Math.floor(((value - low) / (high - low || 1)) * BINS)));
    const heights = groups.map((values) => {
      const counts = new Array(BINS).fill(0);
      values.forEach((value) => counts[bin(value)]++);
      return counts.map((count) => count / values.length);
    });
    const [names, colours, kloms] = ["names", "colours", "kloms"].map((name) => model.get(name));
    const originals = heights[1];
    // The outline of a histogram in a box of 100 x 30.
    const outline = (shares, most) =>
      "M0,30" + shares.map((s, k) => `V${30 - (28 * s) / most}H${((k + 1) * 100) / BINS}`).join("") + "V30";
    const box = (...paths) => drawn("svg", { viewBox: "0 0 100 31", preserveAspectRatio: "none", "aria-hidden": true }, ...paths);
    const line = (shares, most, colour, more = {}) =>
      drawn("path", { d: outline(shares, most), fill: "none", stroke: colour, "stroke-width": 2, "vector-effect": "non-scaling-stroke", ...more });
    const filled = (shares, most, colour) => drawn("path", { d: outline(shares, most), fill: colour });

    path.replaceChildren(
      ...model.get("way").map(([name, group]) => {
        const colour = group ? colours[group - 1] : "var(--dmm-quiet)";
        const mean = groups[group].reduce((sum, value) => sum + value, 0) / groups[group].length;
        const row = box(filled(heights[group], Math.max(...heights[group]), colour));
        return node("div", {}, node("span", {}, name), row, node("span", {}, `margin ${mean.toFixed(1)}`));
      }),
    );
    panels.replaceChildren(
      ...names.map((name, k) => {
        const shares = heights[k + 1];
        const most = Math.max(...heights[0], ...originals, ...shares);
        const head = node("span", {}, name, node("b", {}, kloms[k].toFixed(1)));
        const dashed = line(originals, most, "var(--dmm-quiet)", { "stroke-dasharray": "3 3", "stroke-width": 1.2 });
        return node("div", {}, head, box(filled(heights[0], most, "var(--dmm-line)"), dashed, line(shares, most, colours[k])));
      }),
    );
    el.setAttribute("aria-busy", false);
  }

  // From the click on until the new point's margins are there, what is shown is another's: said at once.
  const busy = () => el.setAttribute("aria-busy", true);
  let root;
  const unplace = placed(el, (found) => {
    root = found;
    root.addEventListener("dmm-focus", busy);
  });
  model.on("change:values", draw);
  if (model.get("counts").length) draw();
  return () => {
    unplace();
    root?.removeEventListener("dmm-focus", busy);
    model.off("change:values", draw);
  };
}

// --- curves ----------------------------------------------------------------------------------------------------

// Lines that begin at 1, from step 0 on, which no logarithm reaches: it is drawn a decade before step 1.
function curves({ model, el }) {
  const [LEFT, TOP, WIDTH, HEIGHT] = [64, 24, 226, 180]; // of what the axes enclose, in a drawing of 300 x 246
  const [LOW, HIGH] = [-4, Math.log10(30)]; // powers of ten that are seen
  const title = node("h4", { class: "dmm-heading" });
  const legend = node("div", { class: "dmm-ends" });
  const panels = node("div", { class: "dmm-axes" });
  const caption = node("p", { class: "dmm-quiet" });
  let frame = 0;
  let undo = [];
  el.classList.add("dmm-curves");
  el.setAttribute("role", "img");
  el.append(title, panels, legend, caption);

  const line = (points, colour, dashed) =>
    drawn("path", { d: points, fill: "none", stroke: colour, "stroke-width": 1.8, "stroke-dasharray": dashed ? "5 3" : "none" });
  const words = (x, y, text, more = {}) => drawn("text", { x, y, "text-anchor": "middle", ...more }, text);
  const power = (x, y, exponent, anchor) => {
    const sign = String(exponent).replace("-", "−");
    return drawn("text", { x, y, "text-anchor": anchor }, "10", drawn("tspan", { dy: -5, "font-size": 9 }, sign));
  };

  function draw() {
    frame = 0;
    const [steps, values] = [typed(model.get("steps"), Float32Array), typed(model.get("values"), Float32Array)];
    const about = model.get("about");
    const { methods, axes } = about;
    const decade = WIDTH / (1 + Math.log10(steps.at(-1)));
    const across = (step) => decade * (step < 1 ? step : 1 + Math.log10(step));
    const up = (exponent) => (HEIGHT * (HIGH - exponent)) / (HIGH - LOW);
    const xs = Array.from(steps, (step) => across(step).toFixed(1));
    const path = (from) => {
      const ys = values.subarray(from, from + xs.length);
      return xs.map((x, k) => (isFinite(ys[k]) ? `${k ? "L" : "M"}${x},${up(Math.log10(ys[k])).toFixed(1)}` : "")).join("");
    };
    const [bottom, right] = [TOP + HEIGHT, LEFT + WIDTH];
    const ticks = [];
    for (let e = 0; 10 ** e <= steps.at(-1); e += 2) {
      const x = LEFT + across(10 ** e);
      ticks.push(drawn("path", { d: `M${x},${TOP}V${bottom}` }), power(x, bottom + 14, e, "middle"));
    }
    for (let e = LOW; e <= HIGH; e++) {
      const y = TOP + up(e);
      ticks.push(drawn("path", { d: `M${LEFT},${y}H${right}` }), power(LEFT - 5, y + 4, e, "end"));
    }
    panels.replaceChildren(
      ...about.panels.map((name, p) => {
        const inside = { x: LEFT, y: TOP, width: WIDTH, height: HEIGHT }; // what goes beyond is cut off
        const lines = methods.map(([, colour, dashed], m) => line(path((p * methods.length + m) * xs.length), colour, dashed));
        return drawn(
          "svg",
          { viewBox: "0 0 300 246", "aria-hidden": true },
          ...ticks.map((tick) => tick.cloneNode(true)),
          words(LEFT, bottom + 14, "0"),
          drawn("path", { d: `M${LEFT},${TOP}V${bottom}H${right}`, class: "dmm-frame" }),
          drawn("svg", inside, ...lines),
          words(LEFT + WIDTH / 2, 14, name, { class: "dmm-name" }),
          words(LEFT + WIDTH / 2, bottom + 34, axes[0]),
          ...axes[1].split("\n").map((part, k) => words(-TOP - HEIGHT / 2, 12 + 14 * k, part, { transform: "rotate(-90)" })),
        );
      }),
    );
    legend.replaceChildren(
      node("p", { class: "dmm-quiet" }, `In ${about.panels[0]}:`),
      ...methods.map(([name, colour, dashed, end]) => {
        const key = drawn("svg", { viewBox: "0 0 24 10", "aria-hidden": true }, line("M1,5H23", colour, dashed));
        return node("div", {}, key, node("b", {}, name), end);
      }),
    );
    title.textContent = about.title;
    caption.textContent = about.caption;
    el.setAttribute("aria-label", model.get("label")); // last, since it says that all is there
  }

  const redraw = () => (frame ||= requestAnimationFrame(draw)); // of several moves within a frame the last is drawn
  undo = [placed(el, (root) => undo.push(nameHandles(root))), watchKernel(model, el)];
  model.on("change:values", redraw);
  draw();
  return () => {
    cancelAnimationFrame(frame);
    undo.forEach((off) => off());
    model.off("change:values", redraw);
  };
}

export default { render: (props) => ({ gallery, scatter, histograms, curves })[props.model.get("kind")](props) };
