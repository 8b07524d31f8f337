"""Colour maps as tables of 256 colours.

viridis and magma are CC0 (matplotlib), turbo is Apache-2.0 (Google); the tables are compressed here because matplotlib is a
heavy dependency for three of them. jet is a formula.
"""

from __future__ import annotations

import base64
import difflib
import functools
import zlib

import torch
from torch import Tensor

from ..errors import InputError

_PACKED = {
    "viridis": (
        "c-jE~1ONO)0aQc+Rz(C?MFm+#2U<o5Tt*6AMhjj?4PZwOVMh>SM-gO46J<ygXGj)kNEc~H7-"
        "~owY)BhzNE~iR9dAe<a7Z9=NFj4bBXme4bx0+4NG5kkD0oOIc}FUGM=W|rEqg~Ud`B;RMlgOxGJZxge?~NbMKys%H-"
        "SYsf<!rkL^^{+JA^|$ghM`sLO+E<K!!p=hCxDyK}3f@MTkH~h(AY&KS+r_Nr^s6i9Sq<Jxz)|PKrEFiabz@J5h@}Qj0oMi#k+{Ia"
        "Q1~R*X1Uj5t}0H(HE0Ta7kcjW%74HC~N1UyU?ijWl76Gh&T1V~sLojxuGAF=mc2XO1ywjxcGCFlvr3YmP5$jxKGEE^dx4Z;mZ+jx"
        "BMHEOCx3a*ix>jw^JID|L=4c8)4{jw*PLDS3`5dX6c3jwpPND1DA6evT)9jwgVQCV`G7f{rGFjwOSRC4`P8g^nbKjwFYUBZ!V8iH"
        ";+RjUtPUB8-h9jg29WjUkVXA&`wBk&Gacj3APXAd`$Al#CyhiyxMYAD4?Cn2R5oiXWPa9-"
        "E3DoQWQti65ScAD@UHpokx#h##ScAEJjKqlO@)h9RYeA*O{Qr-dS@gd?egB&vfYtAZu0f+nqjC#``fu7D}8e=4wlEU|tqvVAVId@"
        "r<oF|~U#wt6(Sc{R6rH@J8>xpz9cc00RuJ-"
        "l>3ymLUkazegwM89xGz;8&wZc4#zOu}qV!)s8)YEs2%RK;jk#%EZ^Wm?E&T*zZy$zov2U}MW)Wy@Y?%v@>BTWrl*Zq8V6&sTHMR&"
        "~%+chOUN(NTQTP=C`-fzwTd)JuldNr}}+i`GVt)<uxlLzCA*mDoU-*gl)tJe}D)pxQa2+Bc=!HmKV)s@yWI+%T}+FS6Y&wcabZ-"
        "YL4?D81h%z~3dp-"
        "y_A~A;{n$%Hbc);T_Q79Ma+&)#4i1;u+fG8QtR;-{TnK<QV1T8Rz5~>g5{j<s0wi9P#BH^yVJ+<{<dyA^Ybe{pTeY=t_D"
    ),
    "magma": (
        "c-jE~1ONO000aR51pxsD0RadC0SN*E3jzWS0|O5O0}=!T6a@qp1_c-"
        "f1sVqi90&&<2?rnw2qFs!Bn$~A4GJj^3o8%{EfEYa5)CmE4Kx%EHWdyy77sfZ4?P(WKN=8191uhu5l0>oNgxqRArVd@5l|!&Qza5"
        "rClXjG5n3t{Tr3e^EfHZa5o0kCWit?GG!SVv5NkLPY&j2ZI}dO@4{<*aazGDsLJxIB4|YWmcSjI-Nf3BS5P3`ydQK60PZE1k5`0n"
        "<d{h&CRup|#6@FP2ep(iOTo!*_7k^(Ee_$AZVi|yB8h~XQfM*+kXdHoR9D!>cfo&auZXSVfAAxcofpZ{%bs>RvA%S=zfq5c=dn1B"
        ";BZ7V;f`BE0fhB>1CV_+|frcl6h$n%GD1nP9fs84Ejw*qWDuIzJfs-qMlq`UjEP$9TfSE0Tn=XHxE`Odcf1odap)h`<Fn*;mex@;"
        "fs4{)3GkvQwe62Kmt~7hFHG8r(d$TrrwKjUUH+i@>dAc}wyg7KiId{K0cfdM!!aH@uJaxr9bjLk&$Ubw*K61=Iam_$+&p>d{L2uG"
        "RZ_`6=)kJO9MQqqbY}rO@+ed2LNNL_lXx~a`;7n)YO=jaxW#ms}<xphjQe)^-V(C<3>Q-"
        "UvS77W|VC`C8?pt2(U0(2CUh!aE@?u@`WL)!QT=ZvL^l4o6Yh3nhT=s5U_i$YIa$NXyT=;fe`FLIVd0qK?UHW}q`hQ;ffnWQBU;B"
        "k%`-frtiDCSTV*HF_{ElS&kY)XnX8n|B{g!C`m}&i*YW<sQ{+(?8pKbo3ZvLZh{-"
        "tsLr*i(ObN;Gy{;YQXu6O>hc>c0_{<M4kwtW7#e*U?C{=0$xy@LL~g#N*W{=$d;#EAaJivGxq{>qL1%#Z%fkp9n-"
        "{?U~F)0O_!m;Tq8{@9xR+MNB|p8ejS{otYf;-mfJrTyin{pYFu>8kzfto-b*{O+*)@Ur~!wEXn8{Pwu~_qqJ}yZrmT{QbXW%3v1"
    ),
    "turbo": (
        "c-"
        "jE~1ONOm5<4;#Lo*mkG#gPh9#}RZUpFLXI45m6Dswt5c{?wFJTitoHH$ttkv}_^KR%p5K%zlIr$I)nLP@bgOSMBzx<paGL{!5>R>"
        "wtI%SBwzMPAcJVb(@u+D2yGMrq(iYvV_5=0|bqM|0~(cJ4=b@JD;{Mt$@~fc8d$_(p~LMu+=Fiu^^4{X~!cLy`VMl>b4N|3I1lKA"
        "ZkMp8h+a{W_!kIHmhHsQNXl_%p5dF|YM6vh*&r@+`OTD!J|`yz3{v=_SDDBg5n(#o{2x-"
        "yg}{9?RMs&Da~z)f&>$8r0Ak)y){!${5+m7~91d-NG2&z!>1Y8REMc<GC8-"
        "wjAcP9p|zi>8~K_tRm~GCG4js?xZU3p)By8FY%i)@|ZRAlsNQ}JoS!0_KHLIher5>O89_I`F&FQdR6*%S^INc{BL3WY-"
        "RmvY5itx{$g?dUv>UmdHz{_|5kwiQ-uFfi2qKD|4WbmNs|9Zmi|PU{z9DoK%f0Tq5VCi{5+@pI;s0Ptot~x`ZuxpHnjLQxA!%<_B"
        "FiqG`{pS!Sgi3@ifNpG|2BX%k4DH>@?8oG}7rc)aNzV<u%#lHrwJh-QYLh-"
        "#6jiH{;tl<=Hsr*E#9cIqTCo?9n>z&pPkTI`PXo^2s{%$2#@JI`+dl_rW^&zB&24Ir_Re`?xs!wm1B<HvF+R{jN3rtTg_qGybPC{"
        "-iPfp)mfQFaDb?{+TTPmMi{~D*liu{f#I6iYEMrCH#aV`+*|+ej)mMANhD5`E?!mavb+>8un}%^=TONW*75g74l#d@m&+}TN3YB5"
        "$#nF>{AcxP!8%&4d_b@=Sd9ZM+@Xd3gSZw;Xw)CKM37D2;4gd+BpZ<HwM-"
        "<2GlbJ(lG_lF9psm1k5W0$|?lNC<DbN1H&Z)!6O2`Ap*Q00=XUnw;cks8v(K!0k0SVtQP^P76GRe0i+WFp%MX}5CNMH0hkT}l??%"
        "s3jvM_0gDL&hzJ6O2Lgcx0)7PodISUE_=g_"
    ),
}

NAMES = ("jet", *_PACKED)


@functools.cache
def _table(name: str) -> Tensor:
    if name == "jet":
        x = torch.arange(256, dtype=torch.float64) / 255
        # Three trapezoids a quarter apart: blue, green, red.
        rgb = torch.stack([(1.5 - (4 * x - peak).abs()).clamp(0, 1) for peak in (3, 2, 1)], 1)
        return (rgb * 255).round().to(torch.uint8)
    raw = bytearray(zlib.decompress(base64.b85decode(_PACKED[name])))
    return torch.frombuffer(raw, dtype=torch.uint8).reshape(256, 3).clone()


def check_name(name: str) -> None:
    """Raise InputError unless there is a colour map ``name``; the nearest is suggested."""
    if name not in NAMES:
        near = difflib.get_close_matches(str(name), NAMES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise InputError(f"Unknown colour map {name!r}: expected one of {', '.join(NAMES)}.{hint}")


@functools.cache
def table_of(name: str, device: torch.device) -> Tensor:
    """The colour map ``name`` as uint8 [256, 3] on ``device``, copied there once.

    Raises:
        InputError: there is no such colour map.
    """
    check_name(name)
    return _table(name).to(device)
