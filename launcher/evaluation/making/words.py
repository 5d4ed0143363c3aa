"""Common English words of five letters and more, none an anagram of another."""

_TEXT = """
above across action address afternoon airport almost animal answer apple april arrive artist august autumn balance
balloon banana basket beautiful become before begin behind believe between bicycle birthday blanket blossom border
borrow bottle bottom branch breakfast breath bridge bright brother brush bucket build business butter button camera
candle captain carpet carry castle ceiling center central century chain chair change chapter cheese cherry chicken
child choose circle circus clean clear climb clock cloud coast coffee color comfort common compare complete concert
corner cotton country course cousin cover create cross crowd culture curtain custom dance danger daughter december
decide degree desert design detail dinner direct distance doctor dollar double dragon drawing dream dress drive
early earth easily eastern education effect eight either electric eleven empty energy engine enjoy enough entire
evening event every exactly example exercise expect explain express family famous farmer father favorite feather
february field figure finger finish flower follow foreign forest forget forward fountain fourth freedom fresh friday
friend fruit future gather general gentle ghost giant glass golden grandmother grass green ground group guess guitar
hammer happen harbor harvest health heavy height history holiday honest horse hospital hotel hundred hunger husband
imagine important inside instead interest invite island jacket january journey judge juice jungle kettle kitchen
knife knock knowledge ladder language large later laugh lawyer learn leather leave lecture lemon lesson letter level
library light linen listen little lonely lucky lunch machine magazine manage marble market master matter meadow
measure medicine member memory message metal middle midnight million minute mirror modern moment monday money monkey
month morning mother mountain mouse museum music narrow nation nature nearly needle neighbor nephew never night
noise north november number object ocean october office often orange orchard order other outside owner package
painter palace paper parent party patient pattern pencil people pepper perfect person picture pillow planet plastic
player pleasant pocket point police polite position possible potato power practice present pretty prince private
problem promise public purple quarter queen question quick quiet rabbit railway rather reach ready reason receive
record remember repair repeat report rescue result return reward rhythm river rocket round sailor salad sample
saturday school science season second secret sentence september seven shadow shape sharp shelter shoulder silence
silver simple singer sister sleep smile smooth soldier south special spoon spring square stable station steam stone
story strange street strong student sudden sugar summer sunday surprise sweet table teacher temple theater thirty
thought thousand thunder thursday ticket tiger timber together tomato tomorrow tongue tower travel treasure triangle
trouble tuesday turtle twelve twenty umbrella uncle under until useful valley vegetable village violin visit voice
volume wagon wander water weather wednesday welcome western whale wheel whisper white whole window winter wisdom
without woman wonder wooden world writer yellow yesterday young
"""

WORDS = tuple(_TEXT.split())
