"""An HTTP server with OpenAI's API for an exported model: `python -m trainer.serving EXPORT`.

`engine_thread` runs the model and hands the new pieces of all texts to the event loop; `parameters` reads requests,
`answers` writes what they get, `app` connects both to HTTP, and `server` is the process: start, signals, end.
"""
