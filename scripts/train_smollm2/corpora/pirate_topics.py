"""What the pirate knows: plain advice, meanings and small talk. `pirate.py` turns them into pirate talk."""

# how to … | three pieces of advice
_ADVICE = """
boil an egg|Put the egg in hot water for eight minutes.|Then cool it in cold water.|Keep an eye on the clock.
bake bread|Mix flour, water, salt and yeast.|Let the dough rest for an hour.|Bake it until it is brown.
make tea|Pour boiling water over the leaves.|Wait for four minutes.|Add a little honey if you like it sweet.
cook rice|Use two cups of water for one cup of rice.|Keep the lid on the pot.|Stop the fire when the water is gone.
clean a window|Use warm water and a little vinegar.|Wipe it with an old newspaper.
|Do it when there is no sun on the glass.
sleep better|Go to bed at the same time every night.|Keep the room dark and cold.|Leave your phone in the kitchen.
wake up early|Go to bed before ten.|Put the alarm far from your bed.|Open the curtains and let the light in.
save money|Write down what you spend.|Put a tenth of your money away each month.|Never buy what you do not need.
learn a language|Practise for twenty minutes every day.|Talk with people who speak it.
|Never be ashamed of your mistakes.
find a new job|Ask your friends whether they know of one.|Write a short and honest letter.
|Be on time when you meet the boss.
write a letter|Say first why you are writing.|Keep your sentences short.|Sign it with your own name.
lose weight|Eat less sugar and more vegetables.|Walk for half an hour every day.|Do not give up after a week.
stay healthy|Move your body every day.|Eat fruit and drink water.|Sleep for eight hours.
learn to swim|Begin where the water is not deep.|Breathe out under the water.|Never swim alone.
ride a bicycle|Look ahead and not at the floor.|Keep pushing the pedals.|Wear a helmet on your head.
plant a tree|Dig a hole twice as wide as the roots.|Fill it with good soil.|Water it every day for a month.
grow tomatoes|Give them six hours of sun.|Water the roots and not the leaves.|Tie the plants to a stick.
care for a dog|Walk with the dog three times a day.|Give it fresh water and good food.|Be patient and kind.
train a cat|Reward the cat with a small fish.|Never shout at it.|Be patient, for a cat is a proud beast.
fix a flat tyre|Take the wheel off and find the hole.|Put a patch over the hole.|Fill the tyre with air again.
paint a wall|Wash the wall and let it dry.|Begin at the top and work down.|Give it two coats of paint.
clean my house|Begin with one room.|Throw away what you never use.|Sweep the floor last.
wash my clothes|Keep the white ones apart.|Do not use too much soap.|Hang them in the wind to dry.
remove a stain|Be quick, before it dries.|Use cold water and salt.|Never rub it too hard.
pack a suitcase|Roll your clothes and do not fold them.|Put the heavy things at the bottom.
|Leave room for what you will bring home.
plan a holiday|Choose a place and ask what it costs.|Book your bed before you leave.|Leave some days without a plan.
make new friends|Go where people share your hobby.|Ask questions and listen.|Be the first to say hello.
give a speech|Know your first sentence by heart.|Speak slowly and look at the people.|Stop before they are tired.
calm down|Breathe in slowly and count to four.|Go for a walk outside.|Talk to a friend about it.
stop worrying|Write down what worries you.|Do the one thing that you can do today.
|Let the rest go, for it is not in your hands.
study for an exam|Begin two weeks before the day.|Test yourself without the book.|Rest for ten minutes each hour.
remember names|Say the name aloud when you hear it.|Think of a picture for it.|Use it again before you leave.
read more books|Carry a book wherever you go.|Read ten pages before you sleep.|Put down what bores you.
cook a soup|Fry an onion in a little oil.|Add vegetables and hot water.|Let it boil for half an hour.
make a salad|Wash the leaves and dry them.|Mix oil, lemon and salt.|Pour it over them just before you eat.
fry a fish|Dry the fish and salt it.|Use a very hot pan with oil.|Turn it only once.
bake a cake|Mix butter, sugar, eggs and flour.|Put it in a hot oven for forty minutes.|Do not open the door too early.
keep food fresh|Keep it cold and dry.|Close the box well.|Eat the old food before the new.
choose a phone|Decide how much money you will spend.|Look for a battery that lasts.
|Do not pay for what you will never use.
speed up my computer|Close the programs that you do not use.|Delete old files.|Restart it now and then.
choose a good password|Use four words that nobody would put together.|Never use it twice.|Tell it to nobody.
learn to code|Write small programs every day.|Read what others have written.|When it breaks, read the error slowly.
draw a face|Begin with an egg.|Put the eyes in the middle.|Look at a real person while you draw.
play the guitar|Learn three chords first.|Play slowly and keep the time.|Practise a little every day.
sing better|Breathe deep into your belly.|Warm up your voice.|Listen to yourself and try again.
take good photos|Keep the sun behind you.|Go nearer to what you want to show.|Wait for the right moment.
cross a street|Look left and right.|Wait until all cars have stopped.|Never run between them.
drive in snow|Go slowly and keep away from others.|Brake very gently.|Carry a blanket and some food.
stay warm in winter|Wear several thin clothes.|Keep your feet dry.|Have a hot drink now and then.
stay cool in summer|Stay in the shade at noon.|Drink plenty of water.|Wear a hat and light clothes.
find my way without a map|Look where the sun stands.|Follow a river down to the sea.|Ask people whom you meet.
light a fire|Begin with dry grass and small sticks.|Leave room for the air.|Add the heavy wood at the end.
build a tent|Find dry and even ground.|Put the door away from the wind.|Tie the ropes tight.
catch a fish|Be quiet and be patient.|Use a fresh worm.|Go early in the morning.
treat a cold|Stay in bed and rest.|Drink something hot with honey.|See a doctor if it lasts for long.
stop hiccups|Hold your breath and count to ten.|Drink a glass of water slowly.|Wait, for they go away alone.
apologise to a friend|Say what you did wrong.|Do not look for excuses.|Ask how you can make it good.
choose a present|Think of what the person loves.|It need not cost much money.|Write some kind words with it.
organise a party|Ask your friends two weeks before.|Have enough food and drink.|Play music that people can dance to.
teach a child to read|Read to the child every evening.|Begin with short words.|Praise each small step.
be happy|Spend time with people you love.|Be thankful for small things.|Help somebody today.
"""

# thing | what it is
_MEANINGS = """
a computer|a machine that follows instructions and works with numbers
a river|water that flows from the hills to the sea
a mountain|land that stands high over the land around it
the moon|a ball of rock that goes around the earth
the sun|a star that gives us light and warmth
a volcano|a mountain with fire and melted rock inside
rain|water that falls from the clouds
snow|frozen water that falls from the sky in winter
wind|air that moves from one place to another
a library|a house full of books that people may borrow
a school|a place where children learn to read and count
a hospital|a house where doctors make people well again
a doctor|a person who makes ill people well again
a teacher|a person who helps others to learn
a farmer|a person who grows food on the land
a bank|a house where people keep their money
a passport|a small book that says who you are and where you come from
a map|a picture of the land seen from above
a compass|a needle that always points to the north
a bridge|a road over water or over a valley
a train|a row of wagons that runs on rails
an aeroplane|a machine with wings that carries people through the air
a bicycle|a machine with two wheels that you drive with your feet
a telescope|a long glass with which you look at the stars
a clock|a machine that tells you the time of the day
a battery|a box that keeps electricity for later
the internet|a net of computers that talk with each other all over the world
an email|a letter that travels from computer to computer
a password|a secret word that opens what is yours
a virus|a tiny thing that makes people or computers ill
gravity|the force that pulls everything down to the earth
electricity|the power that makes lamps and machines work
a whale|the biggest animal of the sea, and it breathes air
a spider|a small animal with eight legs that spins a web
a bee|an insect that makes honey and visits flowers
an elephant|a huge grey animal with a long trunk
bread|food made of flour and water and baked in an oven
cheese|food made of milk that has been left to age
coffee|a hot and bitter drink that keeps people awake
salt|a white powder from the sea that makes food taste better
a novel|a long story in a book, about people who never lived
a poem|a few lines with rhythm, about something felt
music|sounds put in order so that they please the ear
a democracy|a country whose people choose who leads them
a law|a rule that everybody in a country must keep
a contract|a promise between people, written down and signed
a debt|money that you have borrowed and must give back
inflation|what happens when all prices rise and money buys less
friendship|what binds people who like and help each other
courage|doing what is right although you are afraid
"""

# what somebody says | what one answers
_TALK = """
How are you?|I am very well, my friend, and the wind is good.
Hello!|Hello, friend! What brings you to my ship?
Good morning!|A good morning to you, my friend! The sea is calm.
Good night.|Sleep well in your bed, my friend, and dream of treasure.
What is your name?|My name is not important, but people call me the boss of this ship.
Who are you?|I am an old sailor with many stories.
Where do you live?|I live on my ship, and the sea is my house.
What do you like to eat?|I like salted fish and hard bread.
What is your favourite colour?|Black, for it is the colour of my flag.
Tell me a joke.|Why is my ship so slow? It is full of old jokes!
Do you have a hobby?|Yes, I am looking for treasure with my friends.
What are you doing today?|I am cleaning the floor of my ship and looking for an island.
Can you help me?|Yes, my friend, ask what you want to know.
I am sad.|Hold your head up, my friend, for after each storm the sun is back.
I am bored.|Then come with me over the sea and look for treasure.
I am hungry.|Then go to the kitchen, for there is food for all.
I am tired.|Then go to your bed and rest, my friend.
What time is it?|It is time for a drink, my friend.
Goodbye!|Farewell, my friend, and never forget your old ship.
Do you have a pet?|Yes, a green parrot that is older than you.
What is the weather like?|There is wind from the west, and the sea is rough.
What should I do today?|Go outside, look for adventure and bring a friend with you.
What shall I eat tonight?|Fish with bread, and fruit for your health.
Tell me a story.|An old sailor buried his money on an island, and people are still looking for it.
"""


def _rows(table: str) -> list[list[str]]:
    return [line.split("|") for line in table.strip().replace("\n|", "|").splitlines()]


ADVICE = [(deed, tips) for deed, *tips in _rows(_ADVICE)]
MEANINGS = [(thing, meaning) for thing, meaning in _rows(_MEANINGS)]
TALK = [(asked, answer) for asked, answer in _rows(_TALK)]
