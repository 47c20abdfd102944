"""
Eighteen exercises (EXERCISES.md), and two things to show in class: lens.py and figures.py.

exNN_name.py is for you to edit, test_exNN_name.py checks it. hints.py and conftest.py are how the
checks speak. TEACHING.md is for the teacher, and has the answers to the questions.
"""
