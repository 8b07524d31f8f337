// Serves this folder on http://127.0.0.1:8080, and nothing outside of it.

import { createReadStream } from "node:fs";
import { stat } from "node:fs/promises";
import { createServer } from "node:http";
import { extname, join, normalize, sep } from "node:path";
import { fileURLToPath } from "node:url";

const ROOT = fileURLToPath(new URL(".", import.meta.url));
const TYPES = {
  ".html": "text/html", ".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm",
  ".onnx": "application/octet-stream", ".jpg": "image/jpeg", ".png": "image/png",
};

// `extra` are files besides, by the name that the page asks for.
export function serve(port, extra = {}) {
  const server = createServer(async (request, response) => {
    const path = decodeURIComponent(new URL(request.url, "http://host").pathname).slice(1) || "index.html";
    const file = extra[path] ?? normalize(join(ROOT, path));
    const inside = path in extra || file.startsWith(ROOT.endsWith(sep) ? ROOT : ROOT + sep);
    const found = inside && (await stat(file).catch(() => null));
    if (!found || !found.isFile()) return response.writeHead(404).end();
    response.writeHead(200, { "content-type": TYPES[extname(file)] ?? "application/octet-stream", "content-length": found.size });
    createReadStream(file).pipe(response);
  });
  return new Promise((resolve) => server.listen(port, "127.0.0.1", () => resolve(server)));
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const server = await serve(8080);
  console.log(`http://127.0.0.1:${server.address().port}`);
}
