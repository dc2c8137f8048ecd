"""The page: static files that Vite built into `gateway/static`.

Files below `assets/` carry a hash in their name and never change; everything else is asked for
anew each time. A path that is no file is a place inside the page, which sorts it out itself.
"""

from pathlib import Path

from starlette.exceptions import HTTPException
from starlette.responses import PlainTextResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

FOLDER = Path(__file__).parent / "static"
ASSETS = "assets"

_FOR_EVER = "public, max-age=31536000, immutable"
_ASK_FIRST = "no-cache"
NOT_BUILT = "The page has not been built: run `make setup`. The API works without it.\n"


class Pages(StaticFiles):
    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(directory=folder, check_dir=False)
        self._index = folder / "index.html"

    async def check_config(self) -> None:
        """A page that is not there is answered for, not an error of the set-up."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        if path.startswith("tdb."):
            raise HTTPException(405, "calls are POST requests", headers={"allow": "POST"})
        in_assets = path.split("/")[0] == ASSETS
        try:
            response = await super().get_response("index.html" if path == "." else path, scope)
        except HTTPException as error:
            if error.status_code != 404 or in_assets:
                raise
            if not self._index.is_file():
                return PlainTextResponse(NOT_BUILT, 503)
            response = await super().get_response("index.html", scope)
        response.headers["cache-control"] = _FOR_EVER if in_assets else _ASK_FIRST
        return response
