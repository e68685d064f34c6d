// What every page with charts needs: the palette of the reader's light or dark scheme, and word that the charts stand.
"use strict";
window.diptych = {};
(() => {
  function colours() {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    const paper = dark ? "#16181B" : "#FFFFFF", ink = dark ? "#E8E8E8" : "#333333", line = dark ? "#363B42" : "#E6E6E6";
    for (const model of Bokeh.documents[0]._all_models.values()) {
      if (model.type === "Figure") model.setv({ background_fill_color: paper, border_fill_color: paper, outline_line_color: line });
      if (model.type === "Title") model.setv({ text_color: ink });
      if (model.type.endsWith("Axis")) model.setv({ axis_label_text_color: ink, major_label_text_color: ink, axis_line_color: line, major_tick_line_color: line });
      if (model.type === "ColorBar") model.setv({ background_fill_color: paper, major_label_text_color: ink, title_text_color: ink });
      if (model.type === "Grid") model.setv({ grid_line_color: line });
      if (model.type === "Legend") model.setv({ label_text_color: ink });
      if (model.type === "Label") model.setv({ text_color: ink, background_fill_color: paper });
    }
  }

  diptych.standing = () => {
    colours();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", colours);
    requestAnimationFrame(() => requestAnimationFrame(() => {
      document.documentElement.dataset.ready = performance.now().toFixed(0);
    }));
  };
})();
