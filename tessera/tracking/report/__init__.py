"""One page about one run: data from the root, charts, and a document that needs nothing else.

``gather`` reads a root into a ``Report``; ``page.render`` makes the HTML of it. What rooms that
tracking may not know have to say (interviews, promotions, the corpus) comes in as plain data.
"""
