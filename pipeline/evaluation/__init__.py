"""The evaluation's job: tasks x policies x budgets on Ray, tables with intervals, figures, one page.

    tasks --answers.py (Ray)--> one row an item and arm --figures.py--> record --page.py, plots.py--> docs

``sets.py`` reads and writes tasks, ``arms.py`` lists what is compared, ``asking.py`` asks it on a worker,
``looking.py`` is about the model's attention alone, ``records.py`` orders a record's arms, ``conclusions.py``
and ``markdown.py`` put them into words, ``paper.py`` holds the paper's numbers, ``run.py`` puts it together.
"""
