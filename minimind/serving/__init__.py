"""An OpenAI-compatible server, and a chat page on it.

batching.py  the batch in which all texts are written, token by token
texts.py     tokens -> pieces of text, and of a reply's reasoning, words and calls
requests.py  the bodies of requests, checked
models.py    a stage directory -> a model that is served: exported once, its prompts
app.py       the routes, and the answers as objects or streams
web.py       the page (chat.html) and the votes on it
server.py    socket, key, signals
"""
