"""What is decided over the whole corpus, and what that means for the documents of one part.

From what the first pass left beside the text: which documents are copies of earlier ones, which paragraphs an earlier
document has, and which phrases of the evaluation texts are too common to count as leaks.
"""
