"use strict";
// Keeps what the page has fetched, so that it works without a network, and lets it use several threads: browsers want
// two headers for that, which many hosts do not send. A new export has another VERSION and is fetched anew.

const VERSION = "{{version}}", FILES = new Set({{files}}), SMALL = ["./", "page.js", "captioner.js", "captioner.json"];

addEventListener("install", event => {
  event.waitUntil(caches.open(VERSION).then(cache => cache.addAll(SMALL.map(name => new Request(name, {cache: "reload"})))));
});

addEventListener("activate", event => {
  const clear = caches.keys().then(names => Promise.all(names.filter(name => name !== VERSION).map(name => caches.delete(name))));
  event.waitUntil(clear.then(() => clients.claim()));
});

addEventListener("message", () => skipWaiting());

addEventListener("fetch", event => {
  const {method, url} = event.request, own = url.startsWith(registration.scope) && url.slice(registration.scope.length).split("?")[0];
  if (method === "GET" && typeof own === "string" && FILES.has(own)) event.respondWith(answer(event.request));
});

async function answer(request) {
  const cache = await caches.open(VERSION);
  let found = await cache.match(request, {ignoreSearch: true});
  if (!found) {
    found = await fetch(request.url, {cache: "no-cache"});
    if (found.status === 200) await cache.put(request.url, found.clone());
  }
  const headers = new Headers(found.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(found.body, {status: found.status, statusText: found.statusText, headers});
}
