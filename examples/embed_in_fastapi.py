"""A web service that draws with one pipeline: pip install fastapi uvicorn

uvicorn --app-dir examples embed_in_fastapi:app
curl -o cube.png "http://127.0.0.1:8000/draw?prompt=a+red+cube&seed=1"
"""

import asyncio

from fastapi import FastAPI, HTTPException, Request, Response

from dall3 import Dall3Pipeline

app = FastAPI()
pipe = Dall3Pipeline.from_pretrained()
turn = asyncio.Semaphore(1)  # one image at a time; other requests wait in order


@app.get("/draw")
async def draw(request: Request, prompt: str, seed: int = 0) -> Response:
    try:
        previews = pipe.stream(prompt, seed=seed, progress=False)
    except ValueError as error:  # raised before any work
        raise HTTPException(400, str(error)) from None
    async with turn:
        while True:
            # A thread computes the next preview, so that the server can answer other requests meanwhile.
            preview = await asyncio.to_thread(next, previews)
            if preview.output is not None:
                return Response(preview.output._repr_png_(), media_type="image/png")
            if await request.is_disconnected():
                raise HTTPException(499, "cancelled")
