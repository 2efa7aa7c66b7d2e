"""Writes support-json.jsonl: 160 customers' tickets, each with its category and urgency as JSON.

    python examples/make_support_json.py

Everything in it was written for this project; no customer ever sent it. Each ticket has a problem of its own, used
once, so a held-out ticket tells of something that no training ticket does: the category must be understood. How urgent
it is, a second sentence says, from a few dozen that go with any problem. The seed decides which go together, and the
same seed gives the same file.
"""

import json
import random
from collections.abc import Iterator, Mapping
from itertools import cycle, islice
from pathlib import Path
from typing import Any

SEED = 7
OUT = Path(__file__).with_name("support-json.jsonl")
SYSTEM = "Sort the support ticket: category and urgency, as JSON."

PROBLEMS: Mapping[str, tuple[str, ...]] = {
    "billing": (
        "My card was charged twice for the same order.",
        "The March invoice lists a premium plan I never signed up for.",
        "I was promised 20% off at checkout, but the full price went through.",
        "Could you put our VAT number on the receipt for the standing desk?",
        "Why did my monthly fee go from 9 to 14 euros without a word?",
        "A payment of 62.40 to you shows up on my bank statement and I have no idea what it is for.",
        "Your payment page rejects my Visa although my bank says everything is fine.",
        "I'd like to switch from paying monthly to paying once a year.",
        "The gift voucher my aunt gave me is worth 50, yet only 30 came off the total.",
        "Please send me all of last year's invoices for my tax return.",
        "You billed us in dollars, but our contract says pounds.",
        "I ended my trial in time and was still debited this morning.",
        "Is it possible to split this purchase into three instalments?",
        "There is a late fee on my bill, and I paid five days early.",
        "Our accountant needs the bill made out to the company, not to me personally.",
        "The direct debit bounced because you used my old IBAN.",
        "Sales tax was added even though we are a registered charity.",
        "I cannot work out what the item called service adjustment on my bill means.",
        "My student rate disappeared when the subscription renewed.",
        "PayPal says the money went out, but your shop still shows the payment as open.",
        "We have ten seats and are being charged for twelve.",
        "Can I pay by bank transfer instead of credit card from now on?",
        "Two invoices carry the same number, and our bookkeeping software refuses them.",
        "The refund for my overpayment was supposed to be credited to my next bill and wasn't.",
        "How come the cart said 88 and the charge was 97.50?",
        "My company card expires this week; where do I enter the new one for the subscription?",
        "You took the deposit for the rental camera and the whole price as well.",
    ),
    "delivery": (
        "The tracking page has said 'in transit' for nine days.",
        "The courier left my parcel out in the rain on the pavement.",
        "According to the app it was handed to a neighbour, but none of them has it.",
        "Only one of the three boxes in my shipment turned up.",
        "Can the driver bring it to my office rather than to my home?",
        "You sent it to the flat I moved out of in spring.",
        "I need to know whether you ship to Iceland.",
        "The van came while I was at work; how do I arrange another attempt?",
        "My parcel has been sitting at customs since the 4th.",
        "The locker code you texted me doesn't open any door at the pick-up station.",
        "Express shipping was paid for, and it is travelling by ordinary post.",
        "Is there any way to have the sofa carried up to the third floor?",
        "The sender's label has my street but the wrong house number.",
        "Your carrier claims I signed for it, and that is not my signature.",
        "Please hold back my package until I return from holiday on Sunday week.",
        "When will the backordered lamp finally leave the warehouse?",
        "The tracking number in your message belongs to somebody in another city.",
        "They threw the crate over our garden gate and broke a flowerpot.",
        "The order was confirmed on Monday and hasn't been handed to the carrier yet.",
        "My box got returned to you because the doorbell had no name on it.",
        "Could two orders I placed today come in one shipment?",
        "The pick-up shop closed down, so where is my parcel now?",
        "Nobody showed up in the four-hour window I was given for the washing machine.",
        "Your site promises next-day arrival, but the estimate reads eleven days.",
        "Frozen goods reached me completely thawed because the van was so late.",
        "I typed the wrong postcode at checkout a minute ago.",
        "A notice card was in my mailbox without saying where to collect the thing.",
    ),
    "account": (
        "The password reset mail never arrives, not even in spam.",
        "I'm locked out after too many wrong attempts.",
        "Please change the e-mail address on my profile to the new one.",
        "Someone from another country signed in as me last night.",
        "How do I delete my profile together with everything you have stored about me?",
        "My new phone no longer shows the codes for two-factor sign-in.",
        "I seem to have two logins and would like them merged.",
        "The verification link says it has expired as soon as I click it.",
        "My surname changed when I married, and the form won't let me edit it.",
        "A former employee still has administrator rights in our team.",
        "Signing in with Google lands me on an empty profile instead of mine.",
        "Could you tell me which user name belongs to this address?",
        "I want to stop the newsletter but keep my membership.",
        "It says my membership is suspended and gives no reason.",
        "Can my wife and I share one login with separate wish lists?",
        "My loyalty points vanished when I updated my profile picture.",
        "The date of birth you have on file for me is wrong.",
        "I never registered, yet I get welcome mails in my name.",
        "Your system tells me my phone number is already taken by someone else.",
        "We need to hand over ownership of our workspace to a new manager.",
        "The security question asks about a pet I never had.",
        "How can I see on which devices I'm currently logged in?",
        "After the merger our addresses have a new domain and none of us can sign in.",
        "I'd like a copy of all personal data you keep on me.",
        "My invitation to join my colleague's team leads to an error about permissions.",
        "The login form answers that my user doesn't exist, though I used it yesterday.",
        "Please turn off the text message I receive at each sign-in.",
    ),
    "technical": (
        "The app closes by itself whenever I open the camera.",
        "Since the last update the screen stays black after the logo.",
        "Exporting to PDF gives a file of zero bytes.",
        "The thermostat drops off the Wi-Fi every couple of hours.",
        "Your website shows 'error 502' on every page here.",
        "My headphones pair with the laptop but play no sound.",
        "Search returns nothing at all as soon as I type an umlaut.",
        "The robot vacuum keeps driving in circles and reports a blocked wheel.",
        "Syncing hangs at 99 percent on my tablet.",
        "The API answers with status 429 although we send one call a minute.",
        "Video calls freeze for everybody once I share my screen.",
        "The firmware installer complains about a checksum that doesn't match.",
        "Push notifications come hours late on my Android phone.",
        "The printer prints every second page blank.",
        "Dark mode makes the text in the calendar unreadable.",
        "Our webhook stopped receiving events on Tuesday around noon.",
        "The smart lock says its battery is empty right after I replaced it.",
        "When I import a spreadsheet, all dates shift by one day.",
        "The keyboard types double letters at random.",
        "Voice commands only work in English since I switched to French.",
        "The desktop client eats all my memory within an hour.",
        "Uploading pictures larger than ten megabytes fails silently.",
        "The map draws my house in the middle of a lake.",
        "Bluetooth cuts out as soon as the microwave is running.",
        "The undo button in the editor deletes the entire paragraph.",
        "My smartwatch counts steps while it lies on the table.",
        "The backup job finishes green, but the folder it should fill stays empty.",
    ),
    "returns": (
        "These boots are a size too small; I'd like to swap them.",
        "The vase arrived in pieces and I want my money back.",
        "I received a blue jacket although I had ordered the green one.",
        "How long do I have to send back something I bought on sale?",
        "I mailed the blender back three weeks ago and have not been refunded.",
        "The zip on the tent broke on its first night out.",
        "Where can I print the label for sending an item back?",
        "The box for the toaster had already been opened, and it had crumbs inside.",
        "I changed my mind about the rug and it's still wrapped.",
        "The kettle leaks, so I would like a replacement.",
        "Do I have to pay the postage if I don't like the colour?",
        "Half of the screws for the shelf were missing; please take it back.",
        "You refunded the shirt but not the trousers from the same parcel.",
        "My phone case doesn't fit the model it was advertised for.",
        "The perfume smells nothing like the one I know; can it go back if opened?",
        "I got somebody else's book; what should I do with it?",
        "The mattress sags after two months, and it has a ten-year guarantee.",
        "Can I bring an online purchase back to your shop in town?",
        "The dress looks completely different from the photo and I don't want to keep it.",
        "A tyre on the new bicycle will not hold air; please exchange it.",
        "Your warehouse rejected my parcel, saying the tags were gone, and they were not.",
        "I was given two of the same game at Christmas and have no receipt.",
        "The replacement mug you posted has the very same crack.",
        "I'd rather have store credit than a repair for this radio.",
        "The milk frother gave off smoke when I plugged it in, so I want to return it.",
        "The chair came with a scratch across the seat; would a partial refund be possible?",
    ),
    "product": (
        "Does the coffee machine take beans as well as powder?",
        "What is the difference between the Pro and the Lite version?",
        "Is the backpack big enough for a 17-inch laptop?",
        "Will the linen curtains be back in stock in grey?",
        "Can this paint be used on metal garden furniture?",
        "How loud is the dishwasher in night mode?",
        "I'm allergic to nickel; are the earrings free of it?",
        "Which of your bikes would suit someone who is 1.92 m tall?",
        "Does the charger work with 110 volts?",
        "Are the plates safe in a microwave oven?",
        "For how many users is the family plan meant?",
        "Is the protein powder suitable for vegans?",
        "I wonder whether the drone may be flown without a licence.",
        "What material is the inside of the winter coat made of?",
        "Do the light bulbs fit an E14 socket?",
        "Could you recommend a vacuum cleaner for two cats and a carpet?",
        "At what temperature may I wash the wool blanket?",
        "Does your software run on Linux, too?",
        "How many hours does the lantern last on one charge?",
        "Is there a left-handed model of the kitchen scissors?",
        "Would the car seat be right for a four-year-old?",
        "What does the extended warranty cover that the normal one doesn't?",
        "Are spare filters for the aquarium pump sold separately?",
        "Can the wardrobe be assembled without its doors?",
        "Which ink cartridges belong to the home printer you sell?",
        "Is the sun cream waterproof, and is it fine for babies?",
    ),
}

URGENCY: Mapping[str, tuple[str, ...]] = {
    "high": (
        "This cannot wait, I need it solved today.",
        "Our whole office is at a standstill because of this.",
        "Please call me back within the hour!",
        "We leave for the airport tomorrow morning, so please hurry.",
        "I have an important deadline tonight and everything depends on it.",
        "This is an emergency.",
        "Every hour costs us money, so please act immediately.",
        "I must have an answer before noon.",
        "Urgent!!",
        "The event it is for begins in a few hours.",
        "If I don't hear from you today I'll have to call a lawyer.",
        "Please treat this as top priority.",
    ),
    "medium": (
        "Could you look into it this week?",
        "I would be glad to hear from you in the next few days.",
        "Please let me know how we go on from here.",
        "It would be nice to have this settled by the weekend after next.",
        "What should I do now?",
        "A reply in two or three days would be good.",
        "I've written once before and would like an answer this time.",
        "Please get back to me soon, though it's no drama.",
        "It is a bit annoying, so I'd appreciate some help.",
        "Can someone from your team take care of it this week, please?",
        "I'd like this to be sorted out before the end of the month.",
        "Kindly check and tell me what you find.",
    ),
    "low": (
        "No hurry at all.",
        "Whenever you find the time is fine.",
        "I'm just curious.",
        "It's not important, I only thought I'd mention it.",
        "There's no need to answer quickly.",
        "Take your time with this one.",
        "It can easily wait until next month.",
        "I can live with it for now.",
        "Nothing pressing, I'm only asking for later.",
        "If you never get around to it, that's all right, too.",
        "This is just a small thing for when things are quiet on your side.",
        "Feel free to leave this to the end of your queue.",
    ),
}

OPENINGS = (
    "",
    "",
    "",
    "Hello,\n",
    "Hi there. ",
    "Good morning! ",
    "Dear team,\n",
    "Hey! ",
    "To whom it may concern:\n",
)


def tickets() -> Iterator[dict[str, Any]]:
    """Every problem once, in random order, with as many of each urgency as can be."""
    rng = random.Random(SEED)
    urgencies = cycle(rng.sample(sorted(URGENCY), len(URGENCY)))
    cues = {urgency: cycle(rng.sample(sentences, len(sentences))) for urgency, sentences in URGENCY.items()}
    rows = []
    for category, problems in PROBLEMS.items():
        for problem, urgency in zip(problems, islice(urgencies, len(problems)), strict=True):
            ticket = _ticket(problem, next(cues[urgency]), rng)
            rows.append(_row(ticket, {"category": category, "urgency": urgency}))
    rng.shuffle(rows)
    return iter(rows)


def _ticket(problem: str, cue: str, rng: random.Random) -> str:
    """Problem and cue, in either order, with or without a greeting."""
    opening = rng.choice(OPENINGS)
    first, second = (cue, problem) if rng.random() < 0.25 else (problem, cue)
    return f"{opening}{first} {second}"


def _row(ticket: str, answer: dict[str, str]) -> dict[str, Any]:
    said = (("system", SYSTEM), ("user", ticket), ("assistant", json.dumps(answer)))
    return {"messages": [{"role": role, "content": content} for role, content in said]}


def main() -> None:
    """Write the file, one row a line."""
    OUT.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in tickets()), encoding="utf-8")


if __name__ == "__main__":
    main()
