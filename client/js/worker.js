// The worker that runs the SDK: started by bkv.js, and of use to nothing else.
import "./wasm_exec.js"; // Go's own; defines Go

const go = new globalThis.Go();
try {
  const url = new URL("./bkv.wasm", import.meta.url);
  const { instance } = await WebAssembly.instantiateStreaming(fetch(url), go.importObject);
  go.run(instance).then(() => postMessage({ exited: true }), () => postMessage({ exited: true }));
} catch (error) {
  postMessage({ failed: String(error) });
}
