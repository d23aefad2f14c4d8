"""Answers and rewrites by kind: how real models and real data sets write them, and what only looks like it."""

import pytest

import reward

# completion, gold answer; one line a case, "|||" between the two
RIGHT = r"""
\boxed{1011_2} ||| 1011_{2}
\boxed{2B_{16}} ||| 2b_{16}
\boxed{4210_{\text{five}}} ||| 4210_5
\boxed{\text{4210}_5} ||| 4210_5
\boxed{2^{-97}} ||| 1/2^{97}
\boxed{e^{-50}} ||| e^{-50}
\boxed{\frac{1}{e^{50}}} ||| e^{-50}
<think>so \boxed{7}</think> The answer is 8. ||| 8
<think>hm 8</think> \boxed{7} ||| 7
\boxed{11,111,111,100} ||| 11,\! 111,\! 111,\! 100
\boxed{(5,\infty)} ||| x \in (5,\infty)
\boxed{1000\pi} ||| 1{,}000\pi
\boxed{1,000\pi} ||| 1{,}000\pi
\boxed{\frac{20000}{\pi}} ||| \frac{20{,}000}{\pi}
\boxed{\begin{pmatrix}1\\[4pt]2\end{pmatrix}} ||| \begin{pmatrix}1\\2\end{pmatrix}
\boxed{x\leqslant 3} ||| (-\infty,3]
\boxed{(-\infty,2)\cup(3,\infty)} ||| x<2 \text{ or } x>3
\boxed{x<2\text{ or }x>3} ||| (-\infty,2)\cup(3,\infty)
\boxed{x>3 or x<2} ||| (-\infty,2)\cup(3,\infty)
\boxed{x \neq 2} ||| (-\infty,2)\cup(2,\infty)
\boxed{(-\infty,2)\cup(2,\infty)} ||| \mathbb{R}\setminus\{2\}
\boxed{\mathbb{R} \setminus \{-1, 2\}} ||| (-\infty,-1)\cup(-1,2)\cup(2,\infty)
\boxed{m+n = 113} ||| 113
\boxed{\text{Area} = 12} ||| 12
\boxed{\text{Area} = 12\text{ cm}^2} ||| 12
\boxed{f^{-1}(3)=2} ||| 2
\boxed{\frac{a}{b}=\frac23} ||| \frac{2}{3}
\boxed{m_{\max}=n^2-n-1} ||| n^2-n-1
\boxed{(a,b,c)=(1,2,3)} ||| (1,2,3)
\boxed{C(8, -2)} ||| (8,-2)
\boxed{c > b > a} ||| a < b < c
\boxed{between 2 and 5, inclusive} ||| [2,5]
\boxed{\sqrt{2}\%} ||| \sqrt2
\boxed{\sin^{-1} x} ||| \arcsin x
\boxed{4\sin 70^\circ} ||| 4\cos 20^\circ
\boxed{\tan 45°} ||| 1
\boxed{12\ } ||| 12
\boxed{2 \text{ hours and } 30 \text{ minutes}} ||| 2\text{ hours }30\text{ minutes}
\boxed{\begin{cases} x=1 \\ y=2 \end{cases}} ||| x=1, y=2
\boxed{\text{The function is even.}} ||| even
\boxed{\text{isosceles}} ||| \text{isosceles triangle}
\boxed{\angle A = 40^\circ} ||| 40
\boxed{S_{10} = 55} ||| 55
\boxed{P(A \cap B) = \frac{1}{4}} ||| \frac14
\boxed{|AB| = 5} ||| 5
\boxed{\triangle ABC = 6} ||| 6
\boxed{5\text{ children}} ||| 5
\boxed{5 men} ||| 5
\boxed{5 sheep} ||| 5
\boxed{5 Hours} ||| 5
\boxed{1 apple} ||| 1
\boxed{\$5} ||| 5
\boxed{5\$} ||| 5
\boxed{€5} ||| 5
\boxed{5 €} ||| 5
\boxed{£5.50} ||| 5.5
\boxed{5 USD} ||| 5
\boxed{USD 5} ||| 5
\boxed{₹500} ||| 500
\boxed{5{\rm\ cm}} ||| 5
\boxed{5\,\rm{cm}} ||| 5
\boxed{25^\circ\text{C}} ||| 25
\boxed{25°C} ||| 25
\boxed{5\text{ V}} ||| 5
\boxed{5\text{ A}} ||| 5
\boxed{10\text{ W}} ||| 10
\boxed{9.8\ \mathrm{m/s^2}} ||| 9.8
\boxed{9.8\ \mathrm{m}\,\mathrm{s}^{-2}} ||| 9.8
\boxed{120\text{ km h}^{-1}} ||| 120
\boxed{3x\text{ dollars}} ||| 3x
\boxed{2\sqrt{5}\text{ units}} ||| 2\sqrt{5}
The answer is 18 eggs in total. ||| 18
So the answer is 7 (seven). ||| 7
The answer is 42! ||| 42
#### 42 which is what was asked for. ||| 42
#### 42 apples ||| 42
So the correct option is (C). ||| C
The correct choice is (C) ||| C
Therefore, the answer is (C) 12. ||| C
The final answer is $\sqrt{2}$, which is about 1.41. ||| \sqrt{2}
答案：12 ||| 12
答案是 12。 ||| 12
答案为12个 ||| 12
\boxed{１２} ||| 12
\boxed{（3，4）} ||| (3,4)
\boxed{√3} ||| \sqrt{3}
\boxed{2√3} ||| 2\sqrt{3}
\boxed{√(3)} ||| \sqrt{3}
\boxed{√21/5} ||| \frac{\sqrt{21}}{5}
\boxed{½} ||| 0.5
\boxed{3½} ||| 3.5
\boxed{±3} ||| 3, -3
\boxed{x²+1} ||| x^2+1
\boxed{x¹²} ||| x^{12}
\boxed{0.\overline{27}} ||| \frac{3}{11}
\boxed{0.1\overline{6}} ||| 1/6
\boxed{0.1666...} ||| 1/6
\boxed{0.333...} ||| 1/3
\boxed{2**10} ||| 1024
\boxed{\text{twelve}} ||| 12
\boxed{twenty-one} ||| 21
\boxed{\text{forty two}} ||| 42
\boxed{2.5 million} ||| 2500000
\boxed{2.5\text{ million dollars}} ||| 2500000
\boxed{3\text{ dozen}} ||| 36
\boxed{6+(-5)i} ||| 6-5i
\boxed{\text{Option C}} ||| C
\boxed{E: a longer text} ||| E
\framebox{42} ||| 42
\boxed{42} \boxed{} ||| 42
\boxed{50\%} ||| 50
\boxed{10:30\text{ AM}} ||| 10:30\text{ a.m.}
\boxed{7} ||| 7\text{ p.m.}
\boxed{100!} ||| 100!
\boxed{99!\cdot100} ||| 100!
\boxed{10^{100}} ||| 10^{100}
\boxed{\log 100} ||| 2
\boxed{5 \pmod{7}} ||| 5
\boxed{n \equiv 3 \pmod{5}} ||| 3 \pmod 5
\boxed{\frac{3}{4}\text{ cup}} ||| 3/4
\boxed{1\frac{1}{2}\text{ cups}} ||| 1.5
\boxed{1 and 1/2} ||| 1.5
\boxed{1,2,3} ||| \{1,2,3\}
\boxed{a, b} ||| b, a
\boxed{-\infty} ||| -\infty
\boxed{2\pi r} ||| 2\pi r
\boxed{12 sq. ft.} ||| 12
\boxed{3 dollars and 25 cents} ||| \$3.25
\boxed{\text{Monday}} ||| Monday
\boxed{\text{No solution}} ||| \text{no solution}
\boxed{\emptyset} ||| \varnothing
\boxed{\{\}} ||| \emptyset
\boxed{x=1 \text{ and } y=2} ||| (1,2)
\boxed{5\text{ times}} ||| 5
\boxed{5 per day} ||| 5
\boxed{3 more} ||| 3
\boxed{about 5} ||| 5
\boxed{x^{100}} ||| x^{100}
\boxed{x^{50}\cdot x^{50}} ||| x^{100}
\boxed{(1+x)^{10}} ||| (x+1)^{10}
\boxed{\dbinom{5}{2}} ||| 10
\boxed{{5 \choose 2}} ||| 10
\boxed{12\text{~cm}} ||| 12
\boxed{12~\text{cm}} ||| 12
\boxed{\text{The answer is } 12} ||| 12
\boxed{12\;\text{apples}} ||| 12
\boxed{12.} ||| 12
\boxed{Yes} ||| yes
\boxed{True} ||| true
\boxed{3:2} ||| 3:2
\boxed{1/2+1/3} ||| 5/6
**Final Answer:** The train arrives at **4:35 PM**. ||| 4:35 PM
\boxed{9 \text{ (nine)}} ||| 9
\boxed{\text{exactly } 31} ||| 31
\boxed{\{55^\circ\}} ||| 55
\boxed{3 250 000} ||| 3250000
\boxed{\{2+\sqrt{3}, 2-\sqrt{3}, 7\}} ||| \{2 \pm \sqrt{3}, 7\}
\boxed{(\pm 5, \pm 1)} ||| (5,1), (5,-1), (-5,1), (-5,-1)
\boxed{\{t \mid 0 < t \le 4\}} ||| (0, 4]
\boxed{x < 3 \text{ or } x = 8} ||| (-\infty, 3) \cup \{8\}
Only one of them fits, so it is choice (D). ||| \text{(D)}
\boxed{b = 7, a = -2} ||| a = -2, b = 7
\boxed{10^{-4}} ||| 1e-4
\boxed{-\frac{2}{3}} ||| -2./3
\boxed{\sin^{-1}\left(\frac{3}{8}\right)} ||| np.arcsin(3/8)
\boxed{q = n v + c w} ||| n v+c w=q
\boxed{\text{demand} = \text{supply}} ||| supply = demand
3 + 5 = 8. #### 8 g ||| 8
The zeros are $x = \boxed{4}$ and $x = \boxed{-9}$. ||| -9, 4
\boxed{\sqrt{196}} ||| 14
They pay $30 + $42 = **$72** for the 12 tickets. Shall I explain a step? ||| 72
**The first walk takes 35 minutes.** (The second takes 50 minutes and the third 15.) ||| 35
We turn three times, so at last we face **West**. ||| \text{west}
3 * 7 = 21 #### 21</s> ||| 21
\boxed{\text{There is no solution.}} ||| \text{no solution}
\boxed{\text{a scalene triangle}} ||| \text{scalene}
\boxed{\left(\begin{smallmatrix} 5 & 1 \\ 0 & 2 \end{smallmatrix}\right)} ||| \begin{bmatrix} 5&1\\0&2 \end{bmatrix}
\boxed{[[5, 1], [0, 2]]} ||| \begin{pmatrix} 5 & 1 \\ 0 & 2 \end{pmatrix}
\boxed{4\hat{\mathbf{i}} + 7\hat{\mathbf{j}}} ||| 4\mathbf{i} + 7\mathbf{j}
The lines meet at (−6, 11). ||| (-6,11)
\boxed{(3 \pm \sqrt{2}, 3 \mp \sqrt{2})} ||| (3+\sqrt{2}, 3-\sqrt{2}), (3-\sqrt{2}, 3+\sqrt{2})
\boxed{\text{all real numbers less than or equal to } 9} ||| (-\infty, 9]
\boxed{\text{between } 2 \text{ and } 6} ||| (2, 6)
\boxed{\text{all real numbers}} ||| \mathbb{R}
\boxed{r > q > p} ||| p < q < r
\boxed{7 \text{ to } 9} ||| 7:9
The chance is 5 out of 12. ||| \frac{5}{12}
\boxed{8^{\text{th}}} ||| 8
\boxed{312 \text{ (base } 7)} ||| 312_7
\boxed{312 \text{ base seven}} ||| 312_{7}
\boxed{6 \text{ base units}} ||| 6
\boxed{\frac{\pi}{3} + m\pi, m \in \mathbb{Z}} ||| \frac{\pi}{3} + k\pi, k \in \mathbb{Z}
\boxed{\text{The larger angle is } 125^\circ} ||| 125
最后一共有31个。 ||| 31
\boxed{\text{Choice D}} ||| D
\boxed{25\ \mathrm{m^2}} ||| 25
\boxed{4 \bmod 9} ||| 4
\boxed{|x| < \sqrt{5}} ||| (-\sqrt{5}, \sqrt{5})
\boxed{|t| \ge 2} ||| (-\infty, -2] \cup [2, \infty)
综上所述，选C。 ||| C
\boxed{{\large 17}} ||| 17
\boxed{\boldsymbol{\frac{3}{7}}} ||| 3/7
\boxed{\text{$\frac{3}{7}$}} ||| \frac37
\boxed{\frac\pi4} ||| \frac{\pi}{4}
\boxed{0.\dot{4}} ||| 4/9
\boxed{0.\dot{1}4285\dot{7}} ||| 1/7
\boxed{(243)_6} ||| 243_6
\boxed{\sum_{j=1}^{n} j^2} ||| \sum_{k=1}^{n} k^2
\boxed{\int_0^1 t\,dt} ||| \int_0^1 t\,dt
\boxed{e^{i\pi/4}} ||| \frac{\sqrt{2}}{2}+\frac{\sqrt{2}}{2}i
\boxed{\frac{3+4i}{7}} ||| \frac37+\frac47 i
\boxed{\text{Maximum value: } -6} ||| -6
\boxed{\text{So, the total is } 48.} ||| 48
\boxed{\text{either } 4 \text{ or } -4} ||| \pm 4
It is fourteen (14). The answer is fourteen (14). ||| 14
Either way, she keeps 12 pens. ||| 12
\boxed{20\text{ Hz}} ||| 20
\boxed{4\text{ GB}} ||| 4
\boxed{A} ||| \textbf{(A) } 5
\boxed{\text{(A)}} ||| \textbf{(A) } 5
\boxed{5} ||| \textbf{(A) } 5
\boxed{\textbf{(A)}\ 5} ||| \textbf{(A) } 5
\boxed{0.5} ||| \textbf{(D)}\ \frac{1}{2}
\boxed{x < 2 \text{ or } x > 3} ||| (-\infty,2)\cup(3,\infty)
\boxed{\begin{cases}2t, & t \ge 1, \\ 0, & t<1.\end{cases}} ||| \begin{cases}2t & \text{if } t\geq 1\\0&t<1\end{cases}
\boxed{(2\,5\,3)} ||| (2 5 3)
\boxed{45} ||| 45^\circ
\boxed{45\text{ degrees}} ||| 45^\circ
\boxed{20\text{ degrees Celsius}} ||| 20^\circ\text{C}
\boxed{20^\circ} ||| 20^\circ\text{C}
\boxed{30\text{ square centimeters}} ||| 30\text{ cm}^2
\boxed{12\text{ cm}} ||| 12\text{ cm}^2
"""
WRONG = r"""
\boxed{5\text{ kg}} ||| 5\text{ km}
\boxed{12\%} ||| 12 km
\boxed{3.5!} ||| 6
It is either 12 or 14. ||| 14
\boxed{\text{The function is not even.}} ||| even
\boxed{9 \text{ (eight)}} ||| 9
\boxed{\text{anything but } 23} ||| 23
The answer cannot be 21. ||| 21
I could not work out how many there are. There were 15 at the start. ||| 15
\boxed{5\text{ divided by }2} ||| 5
\boxed{5\text{ divided by two}} ||| 5
\boxed{5 (or perhaps six)} ||| 5
\boxed{16\text{ ounces}} ||| 16\text{ pounds}
\boxed{16\text{ oz}} ||| 16\text{ lb}
\boxed{50\text{ cents}} ||| \$50
\boxed{50¢} ||| \$50
\boxed{12 inches} ||| 12 feet
\boxed{12\text{ in}} ||| 12\text{ ft}
\boxed{3\text{ days}} ||| 3\text{ weeks}
\boxed{52_9} ||| 52_8
\boxed{1011_2} ||| 1011
\boxed{\frac{1}{2^{97}}} ||| \frac{1}{2^{96}}
\boxed{5=6} ||| 6
\boxed{3+4=8} ||| 8
<think>so \boxed{7}</think> The answer is 8. ||| 7
\boxed{m + n = 113} ||| 114
\boxed{x^2 = 4} ||| 4
\boxed{2x = 6} ||| 6
\boxed{x=3} ||| y=3
\boxed{25^\circ C} ||| 25^\circ F
The answer is 5 or 6. ||| 5
\boxed{2.5\text{ billion}} ||| 2500000
\boxed{\text{a triangle}} ||| A
The answer is a triangle. ||| A
\boxed{\pi} ||| 3.14
\boxed{3.14159} ||| \pi
\boxed{0.5} ||| 50\%
\boxed{10^{100}} ||| 10^{101}
\boxed{5 \pmod{8}} ||| 5 \pmod{7}
\boxed{\infty} ||| -\infty
\boxed{12 square feet} ||| 12\text{ square inches}
\boxed{5 minutes and 30 seconds} ||| 5
\boxed{5\text{ hours }30\text{ minutes}} ||| 5
\boxed{1 hour and 30 minutes} ||| 1.5
\boxed{\text{Tuesday}} ||| Monday
\boxed{5\text{ remainder }2} ||| 5
\boxed{(10^7)!} ||| 5
\boxed{\Gamma(10^8)} ||| 5
\boxed{5C2} ||| 10
\boxed{\frac{3}{2}} ||| 3:2
\boxed{a = 7, b = -2} ||| a = -2, b = 7
\boxed{n v - c w = q} ||| n v+c w=q
<think>It could be \boxed{6}. Let me see whether ||| 6
It is \boxed{4} or \boxed{6}. ||| 6
**The first walk takes 35 minutes.** (The second takes 50 minutes and the third 15.) ||| 15
She eats **12** of them, so 9 are left. ||| 12
\boxed{\text{not scalene}} ||| \text{scalene}
\boxed{\text{scalene or isosceles}} ||| \text{scalene}
The answer is 4 if $k$ is even and 9 if $k$ is odd. ||| 4
\boxed{p > q > r} ||| p < q < r
\boxed{(3 \pm \sqrt{2}, 3 \pm \sqrt{2})} ||| (3+\sqrt{2}, 3-\sqrt{2})
\boxed{9 \text{ to } 7} ||| 7:9
\boxed{|x| \le \sqrt{5}} ||| (-\sqrt{5}, \sqrt{5})
\boxed{|t| > 2} ||| (-\infty, -2] \cup [2, \infty)
\boxed{x < 3 \text{ or } x = 8} ||| (-\infty, 3)
\boxed{\text{(A) } 5 \text{ or (C) } 6} ||| A
\boxed{50\text{ mph}} ||| 50\text{ km/h}
\boxed{50\text{ miles per hour}} ||| 50\text{ km per hour}
\boxed{18\text{ cm}^3} ||| 18\text{ cm}^2
\boxed{18\text{ cubic feet}} ||| 18\text{ square feet}
\boxed{2\text{ radians}} ||| 2^\circ
\boxed{\prod_{k=1}^{n} k^2} ||| \sum_{k=1}^{n} k^2
\boxed{k^2} ||| \sum_{k=1}^{n} k^2
\boxed{(2\,3\,5)} ||| (2\,5\,3)
\boxed{\frac{3-4i}{7}} ||| \frac37+\frac47 i
\boxed{fourteen (15)} ||| 14
\boxed{4\text{ MB}} ||| 4\text{ GB}
\boxed{B} ||| \textbf{(A) } 5
\boxed{\textbf{(B) } 5} ||| \textbf{(A) } 5
\boxed{6} ||| \textbf{(A) } 5
"""


@pytest.mark.parametrize("cases, right", [(RIGHT, True), (WRONG, False)])
def test_answers(cases, right):
    pairs = [line.split(" ||| ") for line in cases.strip().splitlines()]
    verdicts = reward.verify_all([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    assert [pair for pair, verdict in zip(pairs, verdicts) if verdict != right] == []


PROBLEM = "Lena buys 3 boxes with 8 pens each and gives away 5 pens. How many pens does she keep?"
EXPERT = r"The boxes hold 3*8=<<3*8=24>>24 pens. After the gift she has 24-5=<<24-5=19>>19 pens. \boxed{19}"
STEPS = r"3*8=24 pens are bought and 24-5=19 remain. \boxed{19}"
DISHONEST = [  # rewrite, the one hard cheat in it; "..." stands for STEPS
    ("She keeps 19 pens. First, ...", "early_answer"),
    ("**19**\n\n...", "early_answer"),
    ("#### 19\n...", "early_answer"),
    ("19.\n...", "early_answer"),
    ("The result is 19: ...", "early_answer"),
    ("Result: 19. ...", "early_answer"),
    ("We get nineteen pens. Why? ...", "early_answer"),
    ("The final result will be 19, as ...", "early_answer"),
    ("The reference says: ...", "mentions_source"),
    ("According to the reference, ...", "mentions_source"),
    ("Following the given steps, ...", "mentions_source"),
    ("Rewritten: ...", "mentions_source"),
    ("In the demonstration, ...", "mentions_source"),
    ("The example solution has it: ...", "mentions_source"),
    ("180 km / 2.5 h = 70 km/h. ...", "false_arithmetic"),
    ("Sure! Here is my rewrite: ...", "mentions_source"),
    ("Sure, here's a rewritten version of the solution:\n...", "mentions_source"),
    ("Here is the rewritten answer. ...", "mentions_source"),
    ("In the solution, 24 was computed first. ...", "mentions_source"),
    ("Based on the provided explanation, ...", "mentions_source"),
    ("The expert multiplies first. ...", "mentions_source"),
    ("As shown in the original, ...", "mentions_source"),
    ("Let me rephrase the solution. ...", "mentions_source"),
    ("I'll rewrite this in my own words. ...", "mentions_source"),
    ("The solution you gave me says ...", "mentions_source"),
    ("The solution provided starts with ...", "mentions_source"),
    (r"3*8 \approx 29 pens, 24-5=19. \boxed{19}", "false_arithmetic"),
    (r"She has (3*8=25) pens and 24-5=19. \boxed{19}", "false_arithmetic"),
    (r"(3 + 1) * 8 = 24, and 24 - 5 = 19. \boxed{19}", "false_arithmetic"),
    (r"3 boxes * 8 pens/box = 26 pens. 24-5=19. \boxed{19}", "false_arithmetic"),
    (r"\[ 3 \text{ boxes} \times 8 \text{ pens/box} = 26 \text{ pens} \] and 24-5=19. \boxed{19}", "false_arithmetic"),
    (r"\(3 \times 8 = 26\). \(24 - 5 = 19\). \boxed{19}", "false_arithmetic"),
    (r"\[ 3{,}000 \times 8 = 26{,}000 \] 24-5=19. \boxed{19}", "false_arithmetic"),
    (r"$\frac{24}{3} = 9$, 3*8=24, $24-5=19$. \boxed{19}", "false_arithmetic"),
    (r"$3 \cdot 8 = \mathbf{26}$ and 24-5=19 \boxed{19}", "false_arithmetic"),
    (r"3*8=24. 20\% of 50 is 15. 24-5=19. \boxed{19}", "false_arithmetic"),
    (r"\begin{align*} 3 \times 8 &= 26 \\ 24 - 5 &= 19 \end{align*} \boxed{19}", "false_arithmetic"),
    (r"3 * 8 is 24, 2^5 = 30, 24-5=19. \boxed{19}", "false_arithmetic"),
    (r"3*8=24, 24-5=19. \boxed{19}. Or maybe 18.", "hedged"),
    (r"3*8=24, 24-5=19. \boxed{19} or \boxed{24}", "hedged"),
    (r"3*8=24, 24-5=19. \boxed{19}, possibly 24 if the gift is returned.", "hedged"),
    (r"3*8=24, 24-5=19. \boxed{19} (or 24)", "hedged"),
    (r"So \boxed{19}", "no_reasoning"),
    (r"We multiply the boxes by the pens, then subtract what she gives away. \boxed{19}", "no_reasoning"),
    (r"The final answer is \boxed{19} after 3*8=24 and 24-5=19", "early_answer"),
    ("**19**\n3*8=24, 24-5=19 \\boxed{19}", "early_answer"),
    ("- Multiply the boxes by the pens per box.\n- Subtract the gift.\n\n\\boxed{19}", "no_reasoning"),
    ("3*8=24, 24-5=19. The answer is either 19 or 24. \\boxed{19}", "hedged"),
    ("3*8=24, 24-5=19. The answer is 19, but it could also be 16. \\boxed{19}", "hedged"),
    ("| boxes | 3 × 8 = 26 |\n| kept | 24 − 5 = 19 |\n\n\\boxed{19}", "false_arithmetic"),
    ("The fence has 14 m + 9 m = 24 m. ...", "false_arithmetic"),
    ("26 ÷ 8 = 3 remainder 1. ...", "false_arithmetic"),
    ("3 cups of tea * 4 = 13 cups of tea. ...", "false_arithmetic"),
    ("The car does 90 km / 30 km/h = 4 h of driving. ...", "false_arithmetic"),
    (r"\sqrt{81} = 8. ...", "false_arithmetic"),
    ("Result → 19 pens. We see it so: ...", "early_answer"),
    ("In the end nineteen pens are left with her. ...", "early_answer"),
    ('{"answer": 19}\n\n...', "early_answer"),
    ("The write-up in front of me multiplies first. ...", "mentions_source"),
    ("The text that I was handed multiplies first. ...", "mentions_source"),
    ("12 times × 3 pens = 26 pens. ...", "false_arithmetic"),
    ("$24 ÷ 8 = $4 per pen. ...", "false_arithmetic"),
    (r"3*8=24, 24-5=19. \boxed{18 \text{ to } 19}", "hedged"),
    ("I follow the steps that were shown to me: ...", "mentions_source"),
    ("The official solution multiplies. ...", "mentions_source"),
    (r"3*8=24, 24-5=19. \boxed{19, 24}", "hedged"),
    (r"3*8=24, or maybe 26, and 24-5=19. \boxed{19}", "hedged"),
    (r"3*8=24, 24-5=19, but I'm not sure about the gift. \boxed{19}", "hedged"),
    ("This agrees with the ground truth. ...", "mentions_source"),
    ("The author multiplies first. ...", "mentions_source"),
    ("26 ÷ 8 = 3 R 1. ...", "false_arithmetic"),
    (r"\sqrt{9 + 18} = \sqrt{27} = 5. ...", "false_arithmetic"),
    (r"\sqrt{50} = 7\sqrt{2}. ...", "false_arithmetic"),
    ("10^30 + 1 = 10^30. ...", "false_arithmetic"),
    ("Your solution finds 24 first. ...", "mentions_source"),
    ("60 mph × 5 hours = 310 miles. ...", "false_arithmetic"),
    ("3 gallons/day * 7 days = 22 gallons. ...", "false_arithmetic"),
    ("180 miles / 3 hours = 61 mph. ...", "false_arithmetic"),
    ("12 inches/foot × 5 feet = 61 inches. ...", "false_arithmetic"),
    ("3 boxes * 8 pens is 25 pens. ...", "false_arithmetic"),
    ("16 eggs minus 3 is 14 eggs. ...", "false_arithmetic"),
    ("two boxes * 3 pens = 7 pens. ...", "false_arithmetic"),
    (r"\left(\frac{1}{2}\right)\left(\frac{1}{3}\right) = \frac{1}{5}. ...", "false_arithmetic"),
    ("(2)(3)(4) = 25. ...", "false_arithmetic"),
    (r"2(7)+6 = 21 \checkmark. ...", "false_arithmetic"),
    ("2*7+6 = 21 — so it is. ...", "false_arithmetic"),
    (r"5+3 = 9 \Longrightarrow 24-5=19. ...", "false_arithmetic"),
    ("`5 + 3 = 9`. ...", "false_arithmetic"),
    ("The text above multiplies. ...", "mentions_source"),
    ("As the answer states, we multiply. ...", "mentions_source"),
    (r"3*8=24, 24-5=19. \boxed{19} or 19.5", "hedged"),
    (r"3*8=24, 24-5=19. The answer is 19.0 or 19.5. \boxed{19}", "hedged"),
    ("\\begin{align*} x &= 3 \\times 8 \\\\ &= 26 \\end{align*} 24-5=19. \\boxed{19}", "false_arithmetic"),
]
HONEST = [
    "17/3 = 5 remainder 2. ...",
    "5 bags and 2 left: 17/3 = 5 bags and 2 left. ...",
    "90/60 = 1 hour 30 minutes. ...",
    "90 minutes / 60 = 1 hour and 30 minutes. ...",
    "17/3 = 5 and 2/3. ...",
    "17/3 = 5 2/3. ...",
    "3/3 - 2/3 = 1/3 of 150 = 50. ...",
    "180 km / 2.5 h = 72 km/h. ...",
    "12-3 = 9 and 9/3 = 3. ...",
    "300-60 = 240 and 240/12 = 20. ...",
    "17/3 = 5.67, so 6 buses. ...",
    "17 / 3 ≈ 5.67 ≈ 6. ...",
    "8 + 5 = 1 (mod 12). ...",
    r"8+5 \equiv 1 \pmod{12}. ...",
    "13 mod 12 = 1. ...",
    "8 + 5 = 13 ≡ 1 mod 12. ...",
    "13 = 1 mod 12 and 8+5 = 1 mod 12. ...",
    "Days 1-3 = 6 sweets. ...",
    "Days 1 - 3: 6 sweets. ...",
    "Weeks 2-4 = 9 pens. ...",
    "Using the previous answer, ...",
    "From the previous step: ...",
    ".... Or, in words: nineteen",
    "... or nineteen pens",
    "Two dozen = 24. ...",
    "1/4 cup = 4 tablespoons. ...",
    "1 hour = 60 minutes. ...",
    r"3*8=24 and 24-5=19. Check: 19+5=24. \boxed{19}",
    "2:15 + 0:45 = 3:00. ...",
    "$1,200 - $200 = $1,000. ...",
    "1.200 * 2 = 2.4. ...",
    r"3 x 8 = 24; 24 − 5 = 19 → \boxed{19}",
    r"Step 1: 3*8=24. Step 2: 24-5=19. \boxed{19}",
    "Step 1 - 3*8=24\nStep 2 - 24-5=19\n\\boxed{19}",
    "1. 3*8=24\n2. 24-5=19\n3. \\boxed{19}",
    "- 3*8=24\n- 24-5=19\n\\boxed{19}",
    r"Let x = 3*8 = 24. Then x - 5 = 19. \boxed{19}",
    r"f(3) = 3*8 = 24, f(3) - 5 = 19. \boxed{19}",
    "50% = 0.5 and 1/2 = 50%. ...",
    "0.2 * 50 = 10 = 20% of 50. ...",
    "30% of $20 = $6. ...",
    "5 ft + 6 in = 66 in. ...",
    "2 hours + 30 minutes = 150 minutes. ...",
    "$5 + 50 cents = $5.50. ...",
    "2/3 of 12 is 8. ...",
    "half of 20 is 10. ...",
    "1/2 * 20 = 10. ...",
    "20 / 1/2 = 40. ...",
    "10 / 4 = 2 with 2 left over. ...",
    "3 < 5, 2+2 < 5. ...",
    "10 - 2 - 3 = 5. ...",
    "10 -- 5. ...",
    "4! = 24. ...",
    "C(4,2) = 6. ...",
    r"\sqrt{16} + 2 = 6. ...",
    "2^3 = 8. ...",
    "|3 - 5| = 2. ...",
    "log2(8) + 1 = 4. ...",
    "1/3 + 1/3 + 1/3 = 1. ...",
    "1/3 = 0.33. ...",
    "2 * 1/3 = 0.67. ...",
    r"100/7 = 14.29 \approx 14. ...",
    "$12.50 x 4 = $50. ...",
    "12.5% x 80 = 10. ...",
    "120% of 50 = 60. ...",
    "(1 + 0.2) * 50 = 60. ...",
    "3 dozen + 2 = 38. ...",
    "2 thousand + 500 = 2500. ...",
    "$3 million / 2 = $1.5 million. ...",
    "Solution: ...",
    "**Solution**\n...",
    "We can rewrite 24-5 as 20-1. ...",
    "As given in the problem, ...",
    "To find the answer, ...",
    "The answer is found by subtracting. ...",
    "26 ÷ 8 = 3 remainder 2. ...",
    "26 ÷ 8 = 3 R 2. ...",
    "1/2 of 12 = 6 and 1/3 of 12 = 4. ...",
    "The answer to the first part is 3*8=24. ...",
    "3:1 = 57:19. ...",
    r"\sqrt{50} = 5\sqrt{2} = 7.07. ...",
    r"\sqrt{50} \approx 7. ...",
    r"-\sqrt{50} = -7.07. ...",
    r"(\sqrt{2} + \sqrt{3})^3 = (\sqrt{2} + \sqrt{3})^2 (\sqrt{2} + \sqrt{3}). ...",
    "Counting on by 7: 5, 12, 19, 26. ...",
    "The reference angle of 150° is 180 - 150 = 30. ...",
    "90 km / 30 km/h = 3 h and 90 km / 45 km/h = 2 h. ...",
    "6 ÷ 1/4 = 6 × 4 = 24. ...",
    "| step | pens |\n|---|---|\n| bought | 24 |\n| kept | 19 |\n\n...",
    r"\sqrt{8^2 + 6^2} = \sqrt{100} = 10. ...",
    "5.89 * 10^{-7} / 3 = 1.96 \\times 10^{-7}. ...",
    "The fence has 14 m + 9 m = 23 m. ...",
    "3*8=24. 24-5=19. Check: 19 + 5 = 24. ✓ \\boxed{19}",
    "80{,}000 \\times 1.15 = 92{,}000, ...",
    "This leads to the solution of the first part. ...",
    r"3*8=24. Then 24-5=19, which leads to the solution x = 19. \boxed{19}",
    "This is a version of the distributive law. ...",
    "This could also be written as 20 - 1. ...",
    "180 miles ÷ 60 mph = 3 hours. ...",
    "30 min × 4 = 2 hours. ...",
    "500 g × 4 = 2 kg. ...",
    "Half of the 10 apples plus 3 is 8. ...",
    "When the bus is 3/4 full is 1500*$20 = $30000. ...",
    "We have 6 × 4 = 24 and 1/3 × 24 = 8. ...",
    "$50 - 20% = $40. ...",
    "$50 + 8% tax = $54. ...",
    "30 divided by 1/2 is 60. ...",
    "By the above reasoning, we subtract. ...",
    "This is 80% of the original. ...",
    "The reference triangle has 3 sides. ...",
    r"3*8=24, 24-5=19. \boxed{19} (or 1900%)",
    r"3*8=24, 24-5=19. The answer is 19 pens, or 19.0. \boxed{19}",
]


@pytest.mark.parametrize(
    "answer, rewrite",
    [
        ("2,3", r"(x-2)(x-3)=0, as 2*3=6 and 2+3=5. So the answer is x = 2 or x = 3. \boxed{x = 2 \text{ or } x = 3}"),
        ("C", r"3*8=24. \boxed{(C) \text{ Red or blue}}"),
        ("3/4", r"3 \div 4 = \frac{3}{4}. The answer is 3/4 or 0.75. \boxed{\frac{3}{4}} or 0.75."),
        (
            "120",
            r"60 an hour: 60*2=120. The answer is 120 minutes, or 2 hours. \boxed{120 \text{ minutes}} (or 2 hours)",
        ),
        ("2", r"We solve this in two steps. 6/3 = 2. \boxed{2}"),
        ("3", "To find it we follow these 3 steps:\n1. 6/2 = 3. \\boxed{3}"),
        ("1", "### Step 1: Move the variables\n3-2=1. \\boxed{1}"),
        ("1", r"We want to have the letters on 1 side of the equation alone. 3-2=1. \boxed{1}"),
    ],
)
def test_several_values_other_spellings_and_what_is_only_counted(answer, rewrite):
    parts = reward.cheats("What is it?", r"We work it out. \boxed{?}", rewrite, answer)
    assert [name for name in reward.HARD if parts[name]] == []
    for told in (r"She keeps 2 pens. 6/3 = 2. \boxed{2}", r"The result is two. 6/3 = 2. \boxed{2}"):
        assert reward.cheats("What is it?", r"\boxed{?}", told, "2")["early_answer"]


def test_displays_are_no_repetition():
    steps = [f"Next we add {n} to it, {word}:\n\\[\n{n} + {n} = {2 * n}\n\\]\n" for n, word in enumerate("abcdef")]
    assert reward.cheats(PROBLEM, EXPERT, "\n".join(steps), "19")["repetition"] == 0


def judged(rewrite):
    rewrite = rewrite.replace("...", STEPS)
    return reward.judge(PROBLEM, EXPERT, rewrite, "19", True, reward.verify(rewrite, "19"), 0.0)


@pytest.mark.parametrize("rewrite, cheat", DISHONEST)
def test_dishonest_rewrites(rewrite, cheat):
    parts = judged(rewrite)
    assert [name for name in reward.HARD if parts[name]] == [cheat]
    assert not parts["clean"]


@pytest.mark.parametrize("rewrite", HONEST)
def test_honest_rewrites(rewrite):
    parts = judged(rewrite)
    assert [name for name in reward.HARD if parts[name]] == []
    assert parts["clean"]


def test_a_formula_in_front_is_early_too():
    problem, expert = "How far is (5, 3) from the origin?", r"25 + 9 = 34, so it is \boxed{\sqrt{34}}."
    for rewrite, early in (
        (r"It is $\sqrt{34}$ away. Indeed $25 + 9 = 34$. So \boxed{\sqrt{34}}", 1),
        (r"We add 25 + 9 = 34 and take the root, $\sqrt{34}$. So \boxed{\sqrt{34}}", 0),
    ):
        assert reward.cheats(problem, expert, rewrite, r"\sqrt{34}")["early_answer"] == early


def test_a_figure_is_no_part_of_the_text():
    figure = "\n[asy]\n" + "draw((0,0)--(3,4));\n" * 30 + "[/asy]"
    for rewrite, hard in ((f"{STEPS}{figure}", []), (rf"\boxed{{19}} {STEPS}{figure}", ["early_answer"])):
        parts = reward.cheats(PROBLEM, EXPERT, rewrite, "19")
        assert [name for name in reward.HARD if parts[name]] == hard
        assert parts["padding"] == 0


def test_equations_with_letters_are_reasoning():
    problem, expert = "2x + 6 = 20. Find x.", r"20-6=14 and 14/2=7. \boxed{7}"
    assert not reward.cheats(problem, expert, r"$2x+6=20 \implies 2x=14 \implies x=7$. \boxed{7}", "7")["no_reasoning"]
    assert reward.cheats(problem, expert, r"We solve for x: $x=7$. \boxed{7}", "7")["no_reasoning"]


def test_people_of_the_problem_are_no_source():
    problem, expert = "A teacher and an expert paint 4 walls each. How many?", r"4+4=8. \boxed{8}"
    assert not reward.cheats(problem, expert, r"The expert paints 4, so 4+4=8. \boxed{8}", "8")["mentions_source"]


@pytest.mark.parametrize("texts", [RIGHT.splitlines(), WRONG.splitlines(), [r for r, _ in DISHONEST], HONEST])
def test_one_spelling_stays_as_it_is(texts):
    texts = [*texts, "x \\\\\n&= 3\n\n= 3 \\\\ = 3", "\\textbf{\\text{so}} \\left( 5 \\, 000 \\right)"]
    assert [text for text in texts if reward.spelled(reward.spelled(text)) != reward.spelled(text)] == []


def test_the_gate_finds_its_places_in_the_text_that_it_reads():
    """LaTeX is longer than its spelling: places of the one are not those of the other."""
    told = r"\[ 2 \times \$\text{3} = \$\text{6} \] Hence \[ 1 + \$6 = \$\text{7} \] Therefore \(\boxed{15}\)."
    assert not reward.judge(PROBLEM, EXPERT, told, "15", True, True, 0.0)["gate"]
    assert reward.judge(PROBLEM, EXPERT, told.replace("15", "7"), "7", True, True, 0.0)["gate"]
    later = r"\[ 3 \times 8 = 24 \] \[ 24 - 5 = 19 \] So she keeps \(\boxed{19}\) pens. \[ 7 \times 2 = 14 \]"
    assert reward.judge(PROBLEM, EXPERT, later, "19", True, True, 0.0)["gate"]
