/** Starts the page. */
import { render } from "preact";
import { App } from "./app";
import { follow, start } from "./asking";
import { followTable } from "./explanations";
import { followJobs } from "./jobs";
import { onKey } from "./keyboard";
import { applyTheme } from "./theme";
import "./theme.css";

applyTheme();
render(<App />, document.getElementById("app")!);
addEventListener("keydown", onKey);
addEventListener("hashchange", () => void follow());
followTable();
followJobs();
void start();
