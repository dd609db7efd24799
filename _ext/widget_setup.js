// Runs after require.js and before the widget manager, on pages that have widgets (see nb_ipywidgets_js in _config.yml).
(() => {
  // anywidget.js and the bundle's fonts lie beside this file: nothing is asked of a CDN.
  requirejs.config({ baseUrl: new URL("amd/", document.currentScript.src).href });

  // The theme's Font Awesome would turn every <i> that is added later into an <svg>, and break widgets.Play.
  window.FontAwesomeConfig = { observeMutations: false, ...window.FontAwesomeConfig };

  // The widget manager asks MathJax 2 (Hub.Queue) to typeset a label; the page has MathJax 3.
  window.MathJax ??= {};
  const startup = (window.MathJax.startup ??= {});
  const previous = startup.ready;
  let started;
  let queue = new Promise((resolve) => (started = resolve));
  const Hub = {
    Queue: ([, , element]) => {
      element.classList.add("mathjax_process");
      queue = queue.then(() => window.MathJax.typesetPromise([element]));
    },
  };
  window.MathJax.Hub = Hub;
  startup.ready = () => {
    (previous ?? window.MathJax.startup.defaultReady)();
    window.MathJax.Hub = Hub;
    window.MathJax.startup.promise.then(started);
  };
})();
