"""Reads the pages of runs, for their tests."""

import json
from html.parser import HTMLParser

HOSTILE = '</script></title><script>alert(1)</script><img src=x onerror="alert(1)"><!--\'&'


class Page(HTMLParser):
    """elements: (tag, attributes). texts: contents of script and style elements. text: all other text."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.texts, self.text, self._inside = [], [], "", None
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.content("data"))

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = (tag, dict(attrs)) if tag in ("script", "style") else None

    def handle_endtag(self, tag):
        self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.text += data
        else:
            self.texts.append((*self._inside, data))

    def content(self, name):
        (found,) = [data for _, attributes, data in self.texts if attributes.get("id") == name]
        return found


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def images_of(page):
    return [attributes for tag, attributes in page.elements if tag == "img"]
