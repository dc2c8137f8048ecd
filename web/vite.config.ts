// The page is built into the gateway, which serves it; addresses are relative, so a path prefix works.
// `npm run dev` serves the page alone and passes API calls on to a running gateway.
import { defineConfig } from "vite";

const gateway = "http://127.0.0.1:8080";

export default defineConfig({
  base: "./",
  build: {
    outDir: "../gateway/static",
    emptyOutDir: true,
    target: "es2022",
    modulePreload: { polyfill: false },
    assetsInlineLimit: 0,
  },
  server: { proxy: { "^/tdb\\..*": gateway } },
});
