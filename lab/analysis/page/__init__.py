"""The parts of a report page: columns for the browser, charts that it draws, words and tables. Observation path.

`columns` packs what the timeline shows, `timeline` and `charts` describe figures (Bokeh), `embed` puts them into HTML,
`words` are the tables. Bokeh is imported when a page is made.
"""
