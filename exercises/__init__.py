"""
Eighteen exercises (EXERCISES.md), and lens.py, to show in class what each exit says.

exNN_name.py is for you to edit, test_exNN_name.py checks it. hints.py and conftest.py are how the
checks speak. answers.py and TEACHING.md are for the teacher: the code, and the questions.
"""
