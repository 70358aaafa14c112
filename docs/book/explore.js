// The page "Explore": the views of the notebooks' widgets over results that were computed before; there is no kernel.
(() => {
  const data = window.dmmResults;
  const SPLITS = ["forget", "retain", "validation"];
  const bytes = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const dotted = (n) => n.toFixed(1);

  // What a view expects of a kernel's model: state, changes, and messages, of which it answers those for thumbnails.
  function model(state, answer) {
    const listeners = {};
    const fire = (event, ...values) => (listeners[event] ?? []).forEach((heard) => heard(...values));
    return {
      get: (name) => state[name],
      set(name, value) {
        if (state[name] === value) return;
        state[name] = value;
        fire(`change:${name}`);
      },
      save_changes() {},
      on: (event, heard) => (listeners[event] ??= []).push(heard),
      off: (event, heard) => (listeners[event] = (listeners[event] ?? []).filter((other) => other !== heard)),
      send: (message) => setTimeout(() => answer?.(message, fire)),
    };
  }

  async function pixels() {
    const image = new Image();
    image.src = `data:image/png;base64,${data.images}`;
    await image.decode();
    const canvas = document.createElement("canvas");
    [canvas.width, canvas.height] = [image.width, image.height];
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0);
    return context.getImageData(0, 0, image.width, image.height).data;
  }

  function chooser(name, options) {
    const select = document.createElement("select");
    options.forEach((option, k) => select.add(new Option(option, k)));
    const label = document.createElement("label");
    label.append(`${name} `, select);
    return [label, select];
  }

  async function start() {
    const root = document.getElementById("explore");
    const rgba = await pixels();
    const [height, width, channels] = data.shape;
    const at = new Map(data.shown.map((point, k) => [point, k]));
    const margins = data.sets.map((set) => bytes(set.margins));
    const [setLabel, setSelect] = chooser("Forget set", data.sets.map((set) => set.name));
    const [methodLabel, methodSelect] = chooser("KLoM of", data.methods);
    const [splitLabel, splitSelect] = chooser("Points", SPLITS);
    methodSelect.value = data.first;
    const worst = data.sets.map((set) => Math.max(...set.kloms[data.first].slice(0, set.splits[0])));
    setSelect.value = worst.indexOf(Math.max(...worst)); // where there is most to see
    const title = document.createElement("h3");
    title.setAttribute("role", "status");
    const places = ["gallery", "scatter", "histograms"].map(() => document.createElement("div"));
    const head = document.createElement("div");
    const both = document.createElement("div");
    head.className = "dmm-row";
    both.className = "dmm-both";
    head.append(setLabel, methodLabel, splitLabel);
    both.append(places[0], places[1]);
    root.append(head, both, title, places[2]);

    const set = () => data.sets[setSelect.value];
    const klom = (k) => set().kloms[methodSelect.value][k];
    const shown = () => {
      const split = Number(splitSelect.value);
      const from = set().splits.slice(0, split).reduce((sum, n) => sum + n, 0);
      const all = [...Array(set().splits[split]).keys()].map((k) => from + k);
      return all.sort((a, b) => klom(b) - klom(a));
    };
    const caption = (k) => [data.classes[data.labels[at.get(set().points[k])]], `#${set().points[k]} · ${dotted(klom(k))}`];

    function thumbnails(message, fire) {
      if (message.kind !== "thumbnails") return;
      const size = height * width;
      const answer = new Uint8Array(message.indices.length * size * channels);
      message.indices.forEach((k, j) => {
        const from = at.get(set().points[k]) * size;
        for (let p = 0; p < size; p++)
          for (let c = 0; c < channels; c++) answer[(j * size + p) * channels + c] = rgba[4 * (from + p) + Math.min(c, 2)];
      });
      const captions = message.indices.map(caption);
      const told = { kind: "thumbnails", indices: message.indices, titles: captions.map((c) => c[0]), details: captions.map((c) => c[1]) };
      fire("msg:custom", told, [answer]);
    }

    const common = { shape: data.shape, chosen: new Uint8Array(0), focus: -1, version: 0, label: "" };
    const gallery = model(
      { ...common, kind: "gallery", order: new Int32Array(0), rows: 4, width: 84, selectable: false, outdated: false, empty: "No image." },
      thumbnails,
    );
    const scatter = model(
      { ...common, kind: "scatter", xy: new Float32Array(0), groups: new Int32Array(0), shown: new Uint8Array(0), names: data.classes,
        colours: data.palette, axes: ["KLoM of do nothing", ""], only: -1, selectable: false },
      thumbnails,
    );
    const histograms = model({ kind: "histograms", values: new Float32Array(0), counts: [], names: data.methods, colours: data.colours, kloms: [], way: [], label: "" });

    function show(k) {
      if (k < 0) return;
      [gallery, scatter].forEach((view) => view.set("focus", k));
      const groups = data.methods.length + 1;
      const from = k * groups * data.n_quantiles;
      const [low, high] = [set().low[k], set().high[k]];
      const steps = margins[setSelect.value].subarray(from, from + groups * data.n_quantiles);
      const values = Float32Array.from(steps, (step) => low + (step / 255) * (high - low));
      const mine = Number(methodSelect.value);
      const way = [["original", 1], ["retrained", 0], ["predicted", data.predicted + 1], [data.methods[mine], mine + 1]];
      const kloms = data.methods.map((_, m) => set().kloms[m][k]);
      histograms.set("counts", new Array(groups).fill(data.n_quantiles));
      histograms.set("kloms", kloms);
      histograms.set("way", way.filter(([, group], j) => j < 3 || ![1, data.predicted + 1].includes(group)));
      histograms.set("label", `KLoM of ${caption(k)[0]} #${set().points[k]}: ${data.methods.map((m, j) => `${m} ${dotted(kloms[j])}`).join(", ")}`);
      histograms.set("values", values);
      const [name, detail] = caption(k);
      title.textContent = `${name} ${detail.split(" ")[0]}: KLoM of ${data.methods[mine]} ${dotted(kloms[mine])}, of doing nothing ${dotted(kloms[0])}`;
    }

    function refresh() {
      const points = shown();
      const n = set().points.length;
      const visible = new Uint8Array(n);
      points.forEach((k) => (visible[k] = 1));
      const top = Math.max(...set().kloms.flat());
      const xy = new Float32Array(2 * n);
      for (let k = 0; k < n; k++) xy.set([set().kloms[0][k] / top, klom(k) / top], 2 * k);
      scatter.set("groups", Int32Array.from(set().points, (point) => data.labels[at.get(point)]));
      scatter.set("chosen", new Uint8Array(n));
      scatter.set("axes", ["KLoM of do nothing", `KLoM of ${data.methods[methodSelect.value]}`]);
      scatter.set("label", `KLoM of ${n} points under do nothing and ${data.methods[methodSelect.value]}`);
      scatter.set("xy", xy);
      scatter.set("shown", visible);
      const version = gallery.get("version") + 1;
      [gallery, scatter].forEach((view) => view.set("version", version));
      gallery.set("label", `${points.length} ${SPLITS[splitSelect.value]} images, worst KLoM first`);
      gallery.set("order", Int32Array.from(points));
      show(points[0]);
    }

    [setSelect, methodSelect, splitSelect].forEach((select) => select.addEventListener("change", refresh));
    gallery.on("change:focus", () => show(gallery.get("focus")));
    scatter.on("change:focus", () => show(scatter.get("focus")));
    refresh();
    [gallery, scatter, histograms].forEach((view, k) => window.dmmViews.render({ model: view, el: places[k] }));
  }
  start();
})();
