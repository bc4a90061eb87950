"""Prompts of the pocket examples."""

from __future__ import annotations

# Combinations that the pocket generator was not trained on, and that are not among the training prompts below.
POCKET_HELD_OUT = """a purple square moves up fast over a pink background
a purple circle moves up fast over a pink background
a blue triangle stays still over a brown background
a blue square moves left fast over a pink background
a cyan triangle stays still over a white background
a blue triangle stays still over a white background
a cyan square moves up slowly over a gray background
a purple triangle moves down slowly over a pink background
a cyan circle moves down slowly over a white background
a purple triangle moves down slowly over a black background
a green square moves right fast over a white background
a blue triangle moves left fast over a gray background
a yellow square stays still over a black background
a green square moves down fast over a gray background
a blue triangle moves right slowly over a pink background
a blue square moves left slowly over a white background"""
POCKET_PROMPTS = """a yellow triangle moves right slowly over a white background
a cyan square moves left fast over a pink background
a blue square moves right slowly over a white background
a purple square moves down fast over a white background
a red triangle moves left slowly over a black background
a yellow square moves right slowly over a gray background
a red square moves left fast over a gray background
a purple square stays still over a brown background
a purple square moves right slowly over a brown background
a green circle stays still over a white background
a purple circle moves left slowly over a pink background
a cyan circle moves right slowly over a brown background
a red circle moves down slowly over a brown background
a purple square stays still over a gray background
a green square stays still over a white background
a blue circle stays still over a pink background
a cyan circle moves left fast over a brown background
a red square moves right fast over a brown background
a cyan triangle moves down slowly over a black background
a blue triangle moves up fast over a brown background
a purple square stays still over a black background
a blue circle moves down fast over a gray background
a green circle stays still over a black background
a yellow circle moves down fast over a pink background
a red triangle moves left fast over a pink background
a blue circle moves down slowly over a black background
a cyan triangle moves left fast over a pink background
a cyan square stays still over a brown background
a purple triangle moves left fast over a white background
a cyan triangle moves right slowly over a brown background
a green circle moves up fast over a gray background
a purple square stays still over a pink background
a purple triangle stays still over a brown background
a green square stays still over a gray background
a purple circle moves left fast over a pink background
a cyan square moves down slowly over a gray background
a yellow triangle moves left fast over a pink background
a cyan circle stays still over a pink background
a green circle moves right slowly over a brown background
a yellow circle moves down slowly over a pink background"""
